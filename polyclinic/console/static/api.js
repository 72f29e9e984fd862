// Requests to this console. The key is sent in a header: the browser adds it to no request by itself, and local storage
// is separate for every port of this machine.
const NAME = "polyclinic-key";
let key = localStorage.getItem(NAME) || "";

const headers = () => ({ "content-type": "application/json", "x-polyclinic-key": key });

async function post(path, body) {
  let answer;
  try {
    answer = await fetch(path, { method: "POST", headers: headers(), body: JSON.stringify(body) });
  } catch {
    throw Object.assign(new Error("The console does not answer. Does its command still run?"), { status: 0 });
  }
  const result = await answer.json().catch(() => ({ error: `no answer (${answer.status})` }));
  if (!answer.ok) throw Object.assign(new Error(result.error), { status: answer.status });
  return result;
}

export const known = () => key !== "";

export function forget() {
  key = "";
  localStorage.removeItem(NAME);
}

export async function login(token) {
  key = (await post("/api/login", { token })).key;
  localStorage.setItem(NAME, key);
}

export const act = (name, more = {}) => post("/api/act", { act: name, ...more });

// Follow the stream of events until the returned function is called. EventSource cannot send a header, so the stream is
// read by fetch. While the page is hidden the stream is closed, unless `always` returns true.
export function listen(query, { event, state, always }) {
  let over = false, stop = new AbortController(), wait = 500;
  const visible = () => !document.hidden || always();
  const shown = () => new Promise((go) => document.addEventListener("visibilitychange", go, { once: true }));
  const pause = (time) => new Promise((go) => setTimeout(go, time));

  async function follow() {
    const answer = await fetch(`/api/events?${query}`, { headers: headers(), signal: stop.signal });
    if (answer.status === 401) {
      forget();
      over = true;
      state("locked");
      return;
    }
    if (!answer.ok) throw new Error(String(answer.status));
    state("live");
    wait = 500;
    const reader = answer.body.pipeThrough(new TextDecoderStream()).getReader();
    for (let rest = ""; ;) {
      const { value, done } = await reader.read();
      if (done) return;
      const blocks = (rest + value).split("\n\n");
      rest = blocks.pop();
      const events = blocks.map((block) => [/^event: (.*)$/m.exec(block)?.[1], /^data: (.*)$/m.exec(block)?.[1]]);
      for (const [name, data] of events) if (name && data) event(name, JSON.parse(data));
      if (events.some(([name]) => name)) event("", null);
    }
  }

  async function run() {
    while (!over) {
      if (!visible()) {
        await shown();
        continue;
      }
      stop = new AbortController();
      try {
        await follow();
      } catch { /* the state below says so */ }
      if (over) return;
      if (visible()) {
        state("lost");
        await pause(wait);
        wait = Math.min(wait * 2, 5000);
      }
    }
  }
  const hide = () => { if (!visible()) stop.abort(); };
  document.addEventListener("visibilitychange", hide);
  run();
  return () => {
    over = true;
    stop.abort();
    document.removeEventListener("visibilitychange", hide);
  };
}
