// What the three pages share: the link, the stream, the route, the theme and the messages.
import * as api from "./api.js";
import { h, update } from "./dom.js";

const $ = (id) => document.getElementById(id);
const main = $("main"), root = document.documentElement;
const PAGES = { runs: "./runs.js", site: "./site.js", server: "./server.js" };
let page = null, hello = null, end = null, locked = false;

export const route = () => decodeURIComponent(location.hash.slice(1)) || "/";
export const may = () => hello?.role === "operator";

export function say(text, bad = false) {
  const toast = $("toast");
  toast.textContent = text;
  toast.className = bad ? "toast bad" : "toast";
  toast.hidden = false;
  clearTimeout(say.timer);
  say.timer = setTimeout(() => { toast.hidden = true; }, bad ? 12000 : 6000);
}

export async function ask(name, more) {
  try {
    const result = await api.act(name, more);
    if (result.say) say(result.say);
    return result;
  } catch (error) {
    say(error.message, true);
    return null;
  }
}

let pending = false;
export function render() {
  if (pending || locked || !page) return;
  pending = true;
  requestAnimationFrame(() => {
    pending = false;
    if (locked) return;
    update(main, page.view(route()));
    page.after?.();
    const alerts = page.alerts?.() || [];
    document.title = `${alerts.length ? `(${alerts.length}) ` : ""}${page.name()} · Polyclinic`;
  });
}

// Desktop notifications: each alert once, and only what was not there when the page was opened.
const notified = new Set();
let first = true;
function notify() {
  for (const alert of page.alerts?.() || []) {
    if (notified.has(alert.id)) continue;
    notified.add(alert.id);
    if (!first && bell() && document.hidden) new Notification("Polyclinic", { body: alert.text, icon: new URL("./icon.svg", import.meta.url).href, tag: alert.id });
  }
  first = false;
}
const bell = () => localStorage.getItem("polyclinic-bell") === "on" && globalThis.Notification?.permission === "granted";
function showBell() {
  $("bell").setAttribute("aria-pressed", String(bell()));
  $("bell").textContent = bell() ? "Notifying" : "Notify me";
  $("bell").hidden = !("Notification" in globalThis);
}
$("bell").addEventListener("click", async () => {
  const on = !bell() && (await Notification.requestPermission()) === "granted";
  localStorage.setItem("polyclinic-bell", on ? "on" : "off");
  showBell();
  say(on ? "This browser notifies you while the page is open in a tab." : "No notifications.");
});

const LINK = { live: "live", lost: "connection lost, trying again", locked: "locked" };
function connection(now) {
  $("link").textContent = LINK[now];
  $("link").className = `link ${now}`;
  if (now === "locked") door();
}

function door(problem = "") {
  end?.();
  locked = true;
  $("link").textContent = LINK.locked;
  $("link").className = "link locked";
  update(main, [h("form", { cls: "card form door", "data-do": "open", "data-key": "door" }, h("h1", {}, "This console is locked"),
    h("p", {}, "Open the link that the command printed, or paste its last part. A link works once; the same command with ", h("code", {}, "--link"), " prints another."),
    h("p", { cls: "call bad", role: "alert", hidden: !problem, "data-key": "problem" }, problem),
    h("label", { cls: "field", "data-key": "token" }, h("span", {}, "Link or token"), h("input", { name: "token", autocomplete: "off", spellcheck: "false", required: true })),
    h("div", { "data-key": "buttons" }, h("button", { cls: "main" }, "Open")))]);
}

async function start() {
  end?.();
  locked = false;
  page?.reset?.();
  const query = page?.query?.(route()) || queryOf(route());
  end = api.listen(query, {
    state: connection,
    always: bell,
    async event(name, data) {
      if (name === "hello") {
        hello = data;
        $("where").textContent = data.title;
        $("role").hidden = data.role === "operator";
        $("role").textContent = "viewer: may look only";
        if (!page) page = await import(PAGES[data.kind]);
        queue.splice(0).forEach(([queued, value]) => page.take(queued, value));
        render();
      } else if (!page) {
        if (name) queue.push([name, data]);
      } else if (name) {
        page.take(name, data);
      } else {
        notify();
        render();
      }
    },
  });
}
const queue = []; // events that came while the page's module was loading
const queryOf = (path) => (path.startsWith("/run/") ? `run=${encodeURIComponent(path.slice(5))}` : "");

document.addEventListener("click", (event) => {
  const el = event.target.closest("button[data-do]");
  if (el) page?.doing[el.dataset.do]?.(el.dataset, el);
});
document.addEventListener("submit", async (event) => {
  event.preventDefault();
  const form = event.target;
  if (form.dataset.do !== "open") {
    page?.doing[form.dataset.do]?.(form.dataset, form, event.submitter);
    return;
  }
  try {
    await api.login(form.elements.token.value.trim().replace(/^.*#/, ""));
    await start();
  } catch (error) {
    door(error.message);
  }
});
document.addEventListener("input", (event) => {
  const el = event.target.closest("[data-set]");
  if (!el) return;
  page?.set?.(el.dataset.set, el.type === "checkbox" ? el.checked : el.value, el.dataset);
  render();
});
let last = "";
window.addEventListener("hashchange", () => {
  if (!api.known() || locked) return;
  if (page?.query && page.query(route()) !== page.query(last)) start();
  else render();
  last = route();
  main.focus({ preventScroll: true });
  window.scrollTo(0, 0);
});
$("skip").addEventListener("click", (event) => {
  event.preventDefault();
  main.focus();
});

const dark = () => root.dataset.theme === "dark" || (!root.dataset.theme && matchMedia("(prefers-color-scheme: dark)").matches);
const showTheme = () => { $("theme").textContent = dark() ? "Light" : "Dark"; $("theme").setAttribute("aria-label", dark() ? "Use the light theme" : "Use the dark theme"); };
if (["dark", "light"].includes(localStorage.getItem("polyclinic-theme"))) root.dataset.theme = localStorage.getItem("polyclinic-theme");
$("theme").addEventListener("click", () => {
  root.dataset.theme = dark() ? "light" : "dark";
  localStorage.setItem("polyclinic-theme", root.dataset.theme);
  showTheme();
  page?.themed?.();
  render();
});
showTheme();
showBell();

// A link's token is in the fragment, which no server and no log sees; it leaves the history at once.
const token = location.hash.slice(1);
if (token && !token.startsWith("/")) {
  history.replaceState(null, "", `${location.pathname}#/`);
  last = "/";
  try {
    await api.login(token);
    await start();
  } catch (error) {
    if (api.known()) await start();
    else door(error.message);
  }
} else if (api.known()) {
  last = route();
  await start();
} else {
  door();
}
setInterval(render, 20000); // ages such as "3 min ago"
