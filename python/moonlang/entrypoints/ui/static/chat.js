// The conversation: what is asked, the answer as it comes, and what it cost.

import { chatEvents } from "./api.js";
import { byId, duration, element, setText, short } from "./dom.js";
import { receipt } from "./receipt.js";
import { Tokens } from "./tokens.js";

const NUMBERS = ["temperature", "top_p", "top_k", "min_p", "repetition_penalty", "seed", "max_tokens"];
const NEAR_END = 48; // pixels: who reads further up is not dragged along

export class Chat {
  /** failed: told of every error that is not the user's own stop. */
  constructor(failed) {
    this.failed = failed;
    this.model = "";
    this.messages = [];
    this.running = null;
    this.log = byId("log");
    this.prompt = byId("prompt");
    byId("composer").addEventListener("submit", (event) => {
      event.preventDefault();
      this.submit();
    });
    this.prompt.addEventListener("keydown", (event) => {
      if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
      event.preventDefault();
      this.submit();
    });
    byId("settings").addEventListener("submit", (event) => event.preventDefault());
    byId("stop").addEventListener("click", () => this.running?.abort());
    byId("clear").addEventListener("click", () => this.clear());
  }

  clear() {
    this.running?.abort();
    this.messages = [];
    this.log.replaceChildren(byId("empty"));
    byId("empty").hidden = false;
    this.prompt.focus();
  }

  async submit() {
    const text = this.prompt.value.trim();
    if (!text || this.running) return;
    this.prompt.value = "";
    byId("empty").hidden = true;
    this.messages.push({ role: "user", content: text });
    this.log.append(message("user", "You", element("p", { class: "text" }, text)));
    const answer = new Answer(this.log);
    this.running = new AbortController();
    this.setBusy(true);
    const conversation = this.messages;
    try {
      for await (const event of chatEvents(this.body(), this.running.signal)) answer.add(event);
      answer.finish();
      setText(byId("chat-status"), "The answer is complete.");
    } catch (error) {
      answer.broke(error.name === "AbortError" ? "Stopped." : error.message);
      if (error.name !== "AbortError") this.failed(error);
    }
    if (conversation === this.messages) conversation.push({ role: "assistant", content: answer.content });
    this.running = null;
    this.setBusy(false);
  }

  setBusy(busy) {
    byId("send").disabled = busy;
    byId("stop").disabled = !busy;
    this.log.setAttribute("aria-busy", String(busy));
    if (busy) setText(byId("chat-status"), "The answer is being written.");
  }

  body() {
    const fields = new FormData(byId("settings"));
    const system = String(fields.get("system")).trim();
    const body = {
      model: this.model || undefined,
      messages: system ? [{ role: "system", content: system }, ...this.messages] : this.messages,
      stream: true,
      stream_options: { include_usage: true },
      return_meta_info: true,
    };
    for (const name of NUMBERS) if (fields.get(name) !== "") body[name] = Number(fields.get(name));
    if (fields.get("stop")) body.stop = [fields.get("stop")];
    if (fields.get("logprobs")) {
      body.logprobs = true;
      body.top_logprobs = Number(fields.get("top_logprobs") || 0);
    }
    return body;
  }
}

/** One answer: its text, its tokens when they were asked for, its receipt. */
class Answer {
  constructor(log) {
    this.log = log;
    this.content = "";
    this.begun = performance.now();
    this.first = 0;
    this.meta = null;
    this.usage = null;
    this.words = document.createTextNode("");
    this.text = element("p", { class: "text" }, this.words);
    this.tokens = null;
    this.summary = element("p", { class: "muted summary" });
    this.node = message("assistant", "Model", this.text, this.summary);
    log.append(this.node);
    this.height = 0; // of the log when it was last looked at
    this.following = this.always = false;
    this.follow(true);
  }

  add(event) {
    if (event.usage) this.usage = event.usage;
    const choice = event.choices[0];
    if (!choice) return;
    const words = choice.delta.content;
    if (words) {
      if (!this.first) this.first = performance.now();
      this.content += words;
      this.words.appendData(words);
    }
    if (choice.logprobs?.content.length) {
      if (!this.tokens) this.showTokens();
      this.tokens.add(choice.logprobs.content);
    }
    if (choice.meta_info) this.meta = choice.meta_info;
    if (choice.finish_reason) this.finishReason = choice.finish_reason;
    this.follow(false);
  }

  showTokens() {
    this.tokens = new Tokens();
    this.text.hidden = true;
    this.text.after(this.tokens.node);
  }

  finish() {
    const total = (performance.now() - this.begun) / 1000;
    const waited = this.first ? (this.first - this.begun) / 1000 : total;
    const count = this.usage?.completion_tokens ?? this.meta?.completion_tokens ?? 0;
    const rate = total > waited && count > 1 ? `, ${short((count - 1) / (total - waited))} tokens/s` : "";
    const ended = { length: ", cut at the limit", stop: "" }[this.finishReason] ?? "";
    setText(this.summary, `${count} tokens${rate}, first after ${duration(waited)}${ended}`);
    if (this.meta?.receipt) this.node.append(receipt(this.meta, total));
    this.follow(false);
  }

  broke(why) {
    setText(this.summary, why);
  }

  /** Keep the end in view, for those who were there: once per picture, since it makes the browser lay out the page. */
  follow(always) {
    this.always ||= always;
    if (this.following) return;
    this.following = true;
    requestAnimationFrame(() => {
      const { scrollHeight, scrollTop, clientHeight } = this.log;
      const grown = scrollHeight - this.height;
      if (this.always || scrollHeight - scrollTop - clientHeight - grown < NEAR_END) this.log.scrollTop = scrollHeight;
      this.height = scrollHeight;
      this.always = this.following = false;
    });
  }
}

function message(role, name, ...parts) {
  return element("article", { class: `message ${role}`, "aria-label": name }, element("h3", {}, name), ...parts);
}
