// The frame of the page: views, the key, what goes wrong.

import { getJson, storeKey } from "./api.js";
import { Chat } from "./chat.js";
import { byId, setText } from "./dom.js";
import { Watch } from "./watch.js";

const VIEWS = ["chat", "watch"];

class App {
  constructor() {
    this.watch = new Watch(
      (error) => this.failed(error),
      (state) => this.heard(state),
    );
    this.chat = new Chat((error) => this.failed(error));
    this.asked = false; // the dialog has been shown for the present key
    for (const view of VIEWS) byId(`tab-${view}`).addEventListener("click", () => this.show(view));
    document.querySelector('[role="tablist"]').addEventListener("keydown", (event) => this.step(event));
    byId("key-button").addEventListener("click", () => this.askKey("The key is kept until this tab is closed."));
    byId("key-dialog").addEventListener("close", () => this.keyGiven());
    window.addEventListener("hashchange", () => this.show(this.wanted()));
    this.show(this.wanted());
    this.introduce();
  }

  wanted() {
    const name = location.hash.slice(1);
    return VIEWS.includes(name) ? name : "chat";
  }

  show(view) {
    for (const name of VIEWS) {
      const tab = byId(`tab-${name}`);
      tab.setAttribute("aria-selected", String(name === view));
      tab.tabIndex = name === view ? 0 : -1;
      byId(name).hidden = name !== view;
    }
    if (this.wanted() !== view) history.replaceState(null, "", `#${view}`);
    this.watch.setActive(view === "watch");
  }

  /** Arrow keys move between tabs, as in any list of them. */
  step(event) {
    const at = VIEWS.findIndex((name) => byId(`tab-${name}`) === document.activeElement);
    const move = { ArrowRight: 1, ArrowLeft: -1 }[event.key];
    if (at < 0 || move === undefined) return;
    event.preventDefault();
    const next = VIEWS[(at + move + VIEWS.length) % VIEWS.length];
    this.show(next);
    byId(`tab-${next}`).focus();
  }

  async introduce() {
    try {
      const state = await getJson("ui/state");
      this.heard(state);
      this.watch.take(state); // what happens from now on is counted against it
    } catch (error) {
      this.failed(error);
    }
  }

  heard(state) {
    this.notice("");
    setText(byId("model"), state.model);
    this.chat.model = state.model;
    document.title = state.model ? `${state.model.split("/").pop()} – MoonLang` : "MoonLang";
  }

  failed(error) {
    if (error.status === 401 && !this.asked) {
      this.askKey("The server wants a key. It is kept until this tab is closed.");
    } else {
      this.notice(error.status === 401 ? "The key is missing or wrong: choose “API key” to enter it." : error.message);
    }
  }

  notice(text) {
    const line = byId("notice");
    setText(line, text);
    line.hidden = text === "";
  }

  askKey(text) {
    this.asked = true;
    setText(byId("key-reason"), text);
    byId("key").value = "";
    if (!byId("key-dialog").open) byId("key-dialog").showModal();
  }

  keyGiven() {
    if (byId("key-dialog").returnValue !== "save") return;
    storeKey(byId("key").value);
    byId("key").value = "";
    this.notice("");
    this.introduce();
    this.watch.again();
  }
}

new App();
