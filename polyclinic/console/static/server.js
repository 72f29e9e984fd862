// The coordinator's page.
import { Chart } from "./chart.js";
import { act } from "./api.js";
import { bar, button, call, card, facts, h, note, pill, table, tile } from "./dom.js";
import { ago, bytes, count, list, number, when } from "./format.js";
import { ask, may, render, route, say } from "./main.js";

const chart = new Chart();
let state = null, scores = null, verified = null, confirming = null, request = null, find = "", runsShown = 30, sitesShown = 50;

const STATE = { connected: "good", away: "warn", revoked: "bad", active: "good", finished: "", failed: "bad", cancelled: "bad", waiting: "warn" };
const WORD = { cancelled: "canceled" };
export const name = () => state?.project || "Coordinator";
export const query = (path) => (path?.startsWith("/run/") ? `run=${encodeURIComponent(path.slice(5))}` : "");
export function reset() { scores = null; }
export function take(event, data) {
  if (event === "state") state = data;
  if (event === "scores") scores = data;
}
export function alerts() {
  if (!state) return [];
  const found = state.runs.filter((r) => r.state === "failed").map((r) => ({ id: `failed ${r.run}`, text: `${r.run} failed: ${r.why}` }));
  if (!state.well) found.push({ id: `server ${state.state}`, text: `The server of ${state.project} ${state.state === "not running" ? "is not running" : "does not respond"}.` });
  return found;
}
export const themed = () => { chart.shape = ""; };
export function set(what, value) { if (what === "find") find = value; }

const confirm = (act_, about, key, text, word) => () => { confirming = { act: act_, about, key, text, word }; render(); document.querySelector("[name=confirm]")?.focus(); };
export const doing = {
  start: () => ask("start"),
  rehearse: () => ask("rehearse"),
  stop: () => confirm("stop", "", state.project, "Stop the server. Sites wait, and runs continue from their checkpoints at the next start.", "Stop the server")(),
  revoke: (data) => confirm("revoke", data.site, data.site, `Revoke ${data.site}. The server refuses its messages from now on.`, "Revoke")(),
  reinstate: (data) => confirm("reinstate", data.site, data.site, `Reinstate ${data.site}.`, "Reinstate")(),
  cancel: (data) => confirm("cancel", data.run, data.run, `Cancel ${data.run} for good. Its last checkpoint is kept.`, "Cancel the run")(),
  moreRuns() { runsShown += 100; render(); },
  moreSites() { sitesShown += 100; render(); },
  dismiss() { confirming = null; request = null; render(); },
  async confirm(data, form) {
    const { act: what, about } = confirming;
    const done = await ask(what, { site: about, run: about, confirm: form.elements.confirm.value.trim() });
    if (done) confirming = null;
    render();
  },
  queue(data, form) { if (form.elements.study.value) ask("queue", { study: form.elements.study.value }); },
  export: (data) => ask("export", { study: data.study }),
  report: (data) => ask("report", { export: data.export }),
  async file(data) {
    const tab = window.open("about:blank", "_blank");
    const result = await ask("file", { export: data.export });
    if (result && tab) tab.location.replace(`/report/${result.ticket}`);
    else tab?.close();
  },
  verify: async () => { verified = await ask("verify"); render(); },
  async request(data, form) {
    const file = form.elements.file.files[0];
    if (!file) return;
    try {
      const text = await file.text();
      request = { text, ...(await act("request", { text })) };
    } catch (error) {
      request = null;
      say(error.message, true);
    }
    render();
  },
  async admit(data, form) {
    try {
      const done = await act("admit", { text: request.text, confirm: form.elements.confirm.value.trim() });
      say(done.say);
      window.open(`/report/${done.ticket}`, "_self"); // a download
      request = null;
    } catch (error) {
      say(error.message, true);
    }
    render();
  },
};

const confirmation = () => confirming && h("form", { cls: "card form", "data-do": "confirm", "data-key": `confirm-${confirming.act}-${confirming.about}` }, h("h2", {}, confirming.word), h("p", {}, confirming.text),
  h("label", { cls: "field", "data-key": "name" }, h("span", {}, `Type ${confirming.key} to confirm`), h("input", { name: "confirm", autocomplete: "off", "data-key": "confirm-input" })),
  h("div", { cls: "row", "data-key": "row" }, h("button", { cls: "danger" }, confirming.word), button("Do not", "dismiss")));

function waits() {
  const rows = state.runs.filter((r) => !["finished", "failed", "cancelled"].includes(r.state) && (r.why || Object.keys(r.waiting).length || Object.keys(r.absent).length));
  if (!rows.length) return call("good", "No run waits for anybody");
  return call("", "Waited for", h("ul", { cls: "plain" }, rows.map((r) => h("li", { "data-key": r.run }, h("a", { href: `#/run/${r.run}` }, r.study || r.run), h("span", { cls: "why" },
    [r.why, ...Object.entries({ ...r.absent, ...r.waiting }).map(([site, why]) => (why.startsWith("waits for a person") ? `${site}: a person there has not decided yet` : `${site}: ${why}`))].filter(Boolean).join(" · "))))));
}

function sites() {
  const words = find.toLowerCase().split(/\s+/).filter(Boolean);
  const order = { away: 0, connected: 1, revoked: 2 };
  const found = state.sites.filter((s) => words.every((w) => `${s.name} ${s.organization} ${s.state}`.toLowerCase().includes(w)))
    .sort((a, b) => b.waits.length - a.waits.length || order[a.state] - order[b.state] || a.name.localeCompare(b.name));
  const all = found.slice(0, sitesShown);
  const priv = state.sites.some((s) => s.epsilon);
  return h("section", { cls: "card" }, h("div", { cls: "row" }, h("h2", { cls: "grow" }, "Sites"), state.sites.length > 8 ? h("label", { cls: "row" }, "Find", h("input", { type: "search", "data-set": "find", "data-key": "find" })) : null),
    table("Awaited sites first, then those that are away. The version is that of a site's request to join.",
      ["Site", "State", "Organization", "Last seen", "Version", "Certificate", { t: "Sent", n: 1 }, { t: "Received", n: 1 }, ...(priv ? [{ t: "ε spent", n: 1 }] : []), "Waited for", ...(may() ? ["Actions"] : [])],
      all.map((s) => [s.name, pill(s.state, STATE[s.state]), s.organization, s.heard ? ago(s.heard) : "–", s.version, s.days < 60 ? pill(s.days < 0 ? "expired" : count(Math.floor(s.days), "day"), s.days < 14 ? "bad" : "warn") : count(Math.floor(s.days), "day"),
        bytes(s.sent), bytes(s.received), ...(priv ? [s.epsilon ? (Math.ceil(s.epsilon * 100 - 1e-9) / 100).toFixed(2) : "–"] : []), s.waits.length ? count(s.waits.length, "run") : "–",
        ...(may() ? [s.state === "revoked" ? button("Reinstate", "reinstate", { site: s.name }) : button("Revoke", "revoke", { site: s.name })] : [])]), { keys: all.map((s) => s.name), empty: state.sites.length ? "No site matches." : "No site is admitted yet." }),
    found.length > all.length ? h("div", { cls: "row", "data-key": "more-sites" }, button(`Show more (${found.length - all.length})`, "moreSites")) : null,
    may() ? admission() : null);
}
function admission() {
  if (!request) {
    return h("form", { cls: "row", "data-do": "request", "data-key": "request" }, h("label", { cls: "row", "data-key": "file" }, "Admit a site: its request", h("input", { type: "file", name: "file", accept: ".request,application/json", "data-key": "file-input" })), h("button", {}, "Read the request"));
  }
  return h("form", { cls: "form call", "data-do": "admit", "data-key": "admit" }, h("h2", {}, `Admit ${request.site}?`),
    facts(["Site", request.site], ["Organization", request.organization], ["Version", request.version], ["Known", request.known ? `${request.known}: it gets a new certificate` : "no, it is new"]),
    request.other ? h("p", {}, pill("another organization has this name", "bad")) : null,
    h("p", {}, "Admit only a site that you know, after it has confirmed on the telephone that it sent this request. Read this fingerprint to it, so that it can verify its join file: ", h("code", {}, state.authority)),
    h("label", { cls: "field", "data-key": "name" }, h("span", {}, `Type ${request.site} to confirm`), h("input", { name: "confirm", autocomplete: "off", "data-key": "admit-input" })),
    h("div", { cls: "row", "data-key": "row" }, h("button", { cls: "main" }, "Admit, and download the join file"), button("Do not", "dismiss")));
}

function studies() {
  const rows = state.studies.map((s) => [s.name, s.state === "stopped" ? pill("stopped", "bad") : s.state === "survey" ? "surveys the sites' data" : bar(s.over, s.runs, `${s.over} of ${s.runs} ended`, s.name),
    s.why || "–", ...(may() ? [s.finished ? h("button", { type: "button", "data-do": "export", "data-study": s.name, disabled: s.busy }, s.busy ? "Exporting" : "Export") : "–"] : [])]);
  return card("Studies", table("Each has one run for each method and seed", ["Study", "State", "Reason", ...(may() ? ["Actions"] : [])], rows, { keys: state.studies.map((s) => s.name), empty: "No study is queued." }),
    may() ? h("form", { cls: "row", "data-do": "queue", "data-key": "queue" }, state.files.length ? [h("label", { cls: "row", "data-key": "file" }, "Queue a study file", h("select", { name: "study", "data-key": "study" }, state.files.map((f) => h("option", { value: f }, f)))), h("button", { "data-key": "go" }, "Queue for all sites")] : note("Study files in ", h("code", {}, state.folder), " can be queued here.")) : null,
    state.exports.length ? [h("h3", {}, "Exported"), h("ul", { cls: "plain" }, state.exports.map((e) => h("li", { cls: "row", "data-key": e.name }, h("span", { cls: "grow mono" }, `exports/${e.name}`), e.report ? button("Open report", "file", { export: e.name }) : null, may() && e.run ? button(e.report ? "Write again" : "Write report", "report", { export: e.name }) : null)))] : null);
}

function runs() {
  const rows = state.runs.slice(0, runsShown);
  return card("Runs", table(state.hidden ? `The latest 300; ${state.hidden} older ones are not shown` : "The latest first", ["Run", "State", "Progress", "Method", "Last round", { t: "Faults", n: 1 }, { t: "Attempt", n: 1 }, "Since", ...(may() ? ["Actions"] : [])],
    rows.map((r) => [r.scored ? h("a", { href: `#/run/${r.run}` }, r.run) : r.run, h("span", {}, pill(WORD[r.state] || r.state, STATE[r.state]), r.why ? h("span", { cls: "why" }, r.why) : null), bar(r.round, r.rounds, `${r.round} of ${r.rounds}`, r.run),
      r.rehearsal ? "rehearsal" : r.mode === "survey" ? "survey" : `${r.method}, seed ${r.seed}`, r.asked ? `${r.trained} of ${r.asked} sites` : "–", r.faults, r.attempt, ago(r.since),
      ...(may() ? [["waiting", "active"].includes(r.state) ? button("Cancel", "cancel", { run: r.run }) : "–"] : [])]), { keys: rows.map((r) => r.run), empty: "No run is queued." }),
    state.runs.length > rows.length ? h("div", { cls: "row", "data-key": "more-runs" }, button(`Show more (${state.runs.length - rows.length})`, "moreRuns")) : null);
}

function journal() {
  const j = state.journal;
  return card("Journal", j.broken ? call("bad", "The journal was changed", h("p", {}, j.broken)) : null,
    facts(["Entries", `${count(j.count, "entry", "entries")}${j.behind ? ", more are being read" : ""}`], ["Latest hash", h("span", { cls: "mono" }, j.head.slice(0, 32))], verified && ["Verified", verified.good ? pill(`complete since ${when(verified.first)}`, "good") : pill(verified.problem, "bad")]),
    h("div", { cls: "row", "data-key": "row" }, button("Verify the whole journal", "verify")),
    h("div", { cls: "log", tabindex: "0", role: "region", "aria-label": "Entries of the journal", "data-key": "log" }, h("ul", { cls: "plain" }, j.last.map((e) => h("li", { "data-key": `e${e.seq}` }, h("b", {}, e.event), ` ${e.run || e.site || e.study || e.action || ""} ${e.about || ""}`, h("span", { cls: "why" }, `${e.seq} · ${when(e.time)} ${e.why || ""} ${e.account || ""}`))))));
}
function commands() {
  const rows = state.children.slice(0, 6);
  return rows.length ? h("details", { cls: "card", "data-key": "commands", open: true }, h("summary", {}, "Commands of this console"), h("ul", { cls: "plain" }, rows.map((c) => h("li", { "data-key": `c${c.number}` },
    c.code === null ? pill("running", "good") : c.code ? pill(`failed, code ${c.code}`, "bad") : pill("done"), " ", h("code", {}, c.command), h("span", { cls: "why" }, ago(c.begun)), c.code ? h("pre", { tabindex: "0", role: "region", "aria-label": "Output" }, c.output) : null)))) : null;
}

function one(id) {
  const r = state.runs.find((run) => run.run === id), back = h("nav", { "aria-label": "Back" }, h("a", { href: "#/" }, "← Coordinator"));
  if (!r) return [back, h("p", { cls: "empty" }, "There is no such run.")];
  const mine = scores?.run === id ? scores.rows : [], names = [...new Set(mine.flatMap(([, v]) => Object.keys(v)))].sort();
  chart.series = names.map((site) => ({ name: site, points: new Map(mine.filter(([, v]) => site in v).map(([round, v]) => [round, v[site]])) }));
  return [back, h("div", { cls: "head" }, h("div", { cls: "grow" }, h("h1", {}, r.study || r.run), note(h("span", { cls: "mono" }, r.run), ` · ${r.rehearsal ? "rehearsal" : r.method} · since ${when(r.since)}`)), pill(WORD[r.state] || r.state, STATE[r.state])),
    r.why ? call(r.state === "failed" ? "bad" : "", "", h("p", {}, r.why)) : null,
    h("div", { cls: "tiles" }, tile(`${r.round} / ${r.rounds}`, "rounds"), tile(r.asked ? `${r.trained} / ${r.asked}` : "–", "sites in the last round"), tile(String(r.faults), "faults", r.faults ? "bad" : ""), tile(String(r.attempt), "attempt"), tile(r.working ? "yes" : "no", "its process works")),
    h("section", { cls: "card", "data-key": "curves" }, h("h2", {}, `${r.metric || "Score"} on each site's validation data`), chart.el, chart.tip, names.length ? chart.legend() : note("No scores yet."),
      h("details", { "data-key": "numbers" }, h("summary", {}, "As numbers"), table("By round", ["Round", ...names.map((n) => ({ t: n, n: 1 }))], [...mine].reverse().slice(0, 100).map(([round, v]) => [round, ...names.map((n) => number(v[n]))]), { stack: false }))),
    card("Sites of this run", table("", ["Site", "State", "Remark"], r.sites.map((site) => [site, pill(state.sites.find((s) => s.name === site)?.state || "unknown", STATE[state.sites.find((s) => s.name === site)?.state] || ""), r.waiting[site] || r.absent[site] || "–"]))),
    card("Request", note("Each site compares this hash with what it approved: ", h("code", {}, r.request)))];
}

export function view(path) {
  if (!state) return [h("p", { cls: "empty" }, "Loading")];
  if (path.startsWith("/run/")) return one(path.slice(5));
  const soon = state.sites.filter((s) => s.days < 60 && s.state !== "revoked"), active = state.runs.filter((r) => r.state === "active").length;
  const broken = Object.entries(state.unreadable);
  return [
    h("div", { cls: "head" }, h("div", { cls: "grow" }, h("h1", {}, state.project), note(`${state.organization} · ${state.host}:${state.port} · `, h("code", {}, state.home))),
      pill(`server ${state.state}`, state.well ? "good" : "bad"), may() ? h("div", { cls: "row" }, state.well ? button("Stop", "stop") : button("Start the server", "start", {}, "main"), state.well && state.sites.length ? button("Rehearse", "rehearse") : null) : null),
    confirmation(), state.well ? null : call("bad", state.state === "not running" ? "The server is not running" : "The server does not respond", h("p", {}, "Sites cannot connect, and no run continues until it runs.")),
    h("div", { cls: "tiles" }, tile(`${state.sites.filter((s) => s.state === "connected").length} / ${state.sites.filter((s) => s.state !== "revoked").length}`, "sites connected"), tile(String(active), "runs active"), tile(String(state.runs.filter((r) => r.state === "waiting").length), "runs queued"),
      tile(String(state.runs.reduce((n, r) => n + r.faults, 0)), "faults"), tile(state.own_days === null ? "–" : count(Math.max(0, Math.floor(state.own_days)), "day"), "server's certificate", state.own_days !== null && state.own_days < 30 ? "bad" : "")),
    state.reading ? note(`The records of ${count(state.reading, "run")} are being read; sums below grow until then.`) : null,
    waits(), broken.length ? call("bad", "Entries of the queue that cannot be read", h("ul", {}, broken.map(([run, why]) => h("li", {}, `${run}: ${why}`)))) : null,
    soon.length ? call("", "Certificates end soon", h("p", {}, list(soon.map((s) => `${s.name} in ${count(Math.max(0, Math.floor(s.days)), "day")}`)), ". The site renews with polyclinic site init --renew.")) : null,
    commands(), sites(), studies(), runs(),
    h("div", { cls: "cols two" }, card("Faults", state.faults.length ? table("Replies that were lost or refused, the latest runs first", ["Site", "Run", { t: "Round", n: 1 }, "Reason"], state.faults.slice(0, 50).map((f) => [f.site, f.run, f.round, f.reason])) : note("None.")), journal()),
  ];
}
export function after() {
  if (route().startsWith("/run/") && chart.el.isConnected) chart.draw(chart.series, { x: "round", y: scores?.metric || "score" });
}
