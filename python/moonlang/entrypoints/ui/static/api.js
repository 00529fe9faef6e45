// The way to the server. Paths are relative to the page, so that it works behind a proxy's prefix.

const STORED = "moonlang-key";

/** An answer that is not a good one. status 0: there was none. */
export class Refused extends Error {
  constructor(status, message) {
    super(message);
    this.status = status;
  }
}

/** The key lives as long as the tab. */
export function storeKey(key) {
  if (key) sessionStorage.setItem(STORED, key);
  else sessionStorage.removeItem(STORED);
}

function headers(more = {}) {
  const key = sessionStorage.getItem(STORED);
  return key ? { ...more, authorization: `Bearer ${key}` } : more;
}

async function send(path, options) {
  let response;
  try {
    response = await fetch(path, { ...options, headers: headers(options.headers) });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new Refused(0, "The server does not answer.");
  }
  if (!response.ok) throw new Refused(response.status, await reason(response));
  return response;
}

/** What a refusal says, in whichever of its shapes. */
async function reason(response) {
  try {
    const body = await response.json();
    return body.message ?? body.error?.message ?? (typeof body.error === "string" ? body.error : "") ?? "";
  } catch {
    return `The server answered with status ${response.status}.`;
  }
}

/** A document. */
export async function getJson(path, signal) {
  return (await send(path, { signal })).json();
}

/** The events of a streamed chat completion, as they come. */
export async function* chatEvents(body, signal) {
  const response = await send("v1/chat/completions", {
    method: "POST",
    headers: { "content-type": "application/json" },
    body: JSON.stringify(body),
    signal,
  });
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    const { done, value } = await reader.read();
    if (done) throw new Refused(0, "The answer broke off.");
    const events = (rest + value).split("\n\n");
    rest = events.pop();
    for (const event of events) {
      if (!event.startsWith("data: ")) continue;
      if (event === "data: [DONE]") return;
      const found = JSON.parse(event.slice(6));
      if (found.error) throw new Refused(found.error.code, found.error.message);
      yield found;
    }
  }
}
