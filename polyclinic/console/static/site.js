// The hospital's page.
import { act } from "./api.js";
import { bar, button, call, card, facts, h, note, pill, table, tile } from "./dom.js";
import { ago, bytes, count, list, number, when } from "./format.js";
import { ask, may, render, say } from "./main.js";

let state = null, review = null, missing = "", here = null, verified = null, filter = "", problem = "", busy = false;

export const name = () => state?.site || "Hospital";
export function take(event, data) {
  if (event === "state") state = data;
}
export function alerts() {
  if (!state) return [];
  const alert = state.waiting.map((r) => ({ id: `waits ${r.runs.join(" ")}`, text: `${title(r)} waits for a decision at ${state.site}.` }));
  if (CONNECTION[state.connection.state]?.[0] === "bad") alert.push({ id: `connection ${state.connection.state}`, text: `${state.site}: ${CONNECTION[state.connection.state][1]}` });
  return alert;
}
export function set(what, value) {
  if (what === "filter") filter = value;
}

const title = (r) => (r.rehearsal ? "Rehearsal with synthetic data" : r.study ? `Study ${r.study}` : r.run);
const CONNECTION = {
  connected: ["good", "Connected", "The server has a certificate of this project, and it admits this site."],
  connecting: ["warn", "Connecting", "The site has just started."],
  unreachable: ["bad", "No message from the server", "The server's port answers, but this site has heard nothing for a minute."],
  refused: ["bad", "The server refuses this site", "Ask the coordinator."],
  "no server": ["bad", "The server does not answer", "Nothing can be asked of this site until it does. The check below says what to try."],
  "wrong server": ["bad", "This is not the project's server", "Its certificate is not of this project's authority. Do not continue; ask the coordinator."],
  "not running": ["bad", "This site is not running", "polyclinic site start, or the service, starts it."],
  "not connected": ["bad", "This site is not running", "polyclinic site start, or the service, starts it."],
  "not joined": ["warn", "Not joined yet", "Send the request to the coordinator, then: polyclinic site join FILE --data DIR."],
};
const JOBS = { train: "what training changed", score: "scores, as sums over this site's examples", predict: "the model's prediction for each patient, without names", describe: "the shape of an example; numbers of patients and classes", explain: "attribution maps" };
const jobOf = (job) => JOBS[job.split("/")[0]] || "";

export const doing = {
  back() { location.hash = "#/"; },
  verify: async () => { verified = await ask("verify"); render(); },
  check: async (data) => { await ask("check", { what: data.what }); },
  async decide(data, form, pressed) {
    if (busy) return;
    const chosen = pressed.value, fields = form.elements;
    busy = true;
    render();
    try {
      const done = await act("decide", { run: review.run, shown: review.shown, state: chosen, read: fields.read.checked, reason: fields.reason.value, by: fields.by.value });
      say(`${chosen === "approved" ? "Approved" : "Refused"}: ${list(done.runs)}. The decision is signed and in the journal.`);
      review = null;
      problem = "";
      location.hash = "#/";
    } catch (error) {
      problem = error.message;
      if (error.status === 409) {
        form.elements.read.checked = false;
        await read(review.run);
      }
    }
    busy = false;
    render();
  },
};

async function read(run) {
  try {
    review = await act("review", { run });
    missing = "";
  } catch (error) {
    review = null;
    missing = error.message;
  }
  render();
}

// Patients are counted by a command of its own, because reading data takes longer than showing a page.
async function countPatients() {
  const shown = review?.shown, run = review?.run;
  here = { for: shown };
  while (review?.shown === shown && location.hash.startsWith("#/review/")) {
    const result = await act("count", { run }).catch((error) => ({ done: true, error: error.message }));
    if (result.done) {
      here = { for: shown, ...result };
      render();
      return;
    }
    await new Promise((go) => setTimeout(go, 1000));
  }
}

export function view(path) {
  if (!state) return [h("p", { cls: "empty" }, "Loading")];
  if (path.startsWith("/review/")) {
    const run = path.slice(8);
    if (review?.run !== run && !review?.runs.includes(run)) {
      if (view.asked !== run) {
        view.asked = run;
        problem = "";
        read(run);
      }
      return [h("nav", { "aria-label": "Back" }, h("a", { href: "#/" }, "← Hospital")), h("p", { cls: "empty" }, missing || "Loading")];
    }
    if (here?.for !== review.shown) countPatients();
    return reading(review);
  }
  view.asked = "";
  review = null;
  return [
    h("div", { cls: "head" }, h("div", { cls: "grow" }, h("h1", {}, state.site), note(state.organization ? `${state.organization} · ` : "", h("code", {}, state.home)))),
    waiting(), problems(),
    h("div", { cls: "cols two" }, connection(), running()), left(),
    h("div", { cls: "cols two" }, journal(), h("div", { cls: "cols" }, policy(), budget(), checks())),
  ];
}

function waiting() {
  if (!state.waiting.length) return call("good", "Nothing waits for a decision", h("p", {}, "A study that a person must decide about appears here by itself."));
  return call("", state.waiting.length === 1 ? "A study waits for a decision" : `${state.waiting.length} studies wait for a decision`,
    h("ul", { cls: "plain" }, state.waiting.map((r) => h("li", { cls: "head", "data-key": r.run }, h("div", { cls: "grow" },
      h("b", {}, title(r)), ` · ${list(r.methods)} · ${count(r.rounds, "round")} · with ${list(r.sites.filter((s) => s !== state.site)) || "no other site"}`,
      h("span", { cls: "why" }, `arrived ${ago(r.seen)} · ${list(r.runs)}${r.refused ? " · refused by this site's policy" : ""}`)),
    h("a", { cls: "button main", href: `#/review/${r.run}` }, may() ? "Read and decide" : "Read")))));
}

const problems = () => (state.problems.length
  ? call("bad", "Problems", h("ul", { cls: "plain" }, state.problems.map((p) => h("li", {}, p.run && h("b", {}, `${p.run}: `), p.problem, p.since ? h("span", { cls: "why" }, ago(p.since)) : null))))
  : null);

function connection() {
  const c = state.connection, [kind, word, says] = CONNECTION[c.state] || ["warn", c.state, ""];
  const heading = [h("span", { cls: "q" }, "1"), "Who is this site connected to?"];
  if (c.state === "not joined") return card(heading, h("p", {}, pill(word, kind)), note(says));
  return card(heading, h("p", {}, pill(word, kind)), note(says, c.refused ? ` It says: ${c.refused}` : ""),
    facts(["Project", h("b", {}, c.project)],
      ["Server", `${c.host}:${c.port}`, h("span", { cls: "why" }, `outgoing connections only${c.proxy ? `, through ${c.proxy}` : ""}; this site opens no port`)],
      ["Last message", ago(c.heard)],
      ["Certificate", c.days < 60 ? pill(c.days < 0 ? "expired" : `ends in ${count(Math.floor(c.days), "day")}`, c.days < 14 ? "bad" : "warn") : `valid for ${count(Math.floor(c.days), "day")}`],
      ["Authority", h("span", { cls: "mono" }, c.authority), h("span", { cls: "why" }, "compare it with the coordinator's on the telephone")]),
    h("h3", {}, "Checked from here"),
    c.checks.length ? h("ul", { cls: "plain" }, c.checks.map(([what, good, says_]) => h("li", { "data-key": what }, pill(good ? "ok" : "failed", good ? "good" : "bad"), ` ${what}: ${says_}`))) : note("checking"),
    c.processes ? note(`${count(c.processes, "process", "processes")} of this site run without their supervisor: polyclinic site start takes them over.`) : null);
}

function running() {
  const now = state.doing.length ? h("ul", { cls: "plain" }, state.doing.map((d) => h("li", { "data-key": d.run }, pill("working", "good"), ` ${d.run}: ${d.job || d.kind}, round ${d.round}`, d.total ? bar(d.done, d.total, `minibatch ${d.done.toLocaleString("en-US")} of ${d.total.toLocaleString("en-US")}`, `Progress of ${d.run}`) : null, h("span", { cls: "why" }, `since ${ago(d.since)}`)))) : null;
  return card([h("span", { cls: "q" }, "2"), "What is running?"], now,
    state.running.length ? h("ul", { cls: "plain" }, state.running.map((r) => h("li", { "data-key": r.run }, h("b", {}, r.study || r.run), ` · ${list(r.methods)}`,
      bar(r.round, r.rounds, `round ${r.round} of ${r.rounds}`, r.run), h("span", { cls: "why" }, `${r.run} · ${r.event}${r.reason ? `: ${r.reason}` : ""}, ${ago(r.time)}`)))) : now ? null : note("Nothing runs at this site now."),
    state.decided.length ? h("details", { "data-key": "decided" }, h("summary", {}, `Decisions (${state.decided.length})`), h("ul", { cls: "plain" }, state.decided.map((r) => h("li", { "data-key": r.run },
      pill(r.state, r.state === "approved" ? "good" : "bad"), " ", h("a", { href: `#/review/${r.run}` }, title(r)),
      h("span", { cls: "why" }, `${r.run} · ${when(r.decided)} · ${r.by} (account ${r.account})${r.of ? `, for ${r.of}` : ""}: ${r.reason}`))))) : null);
}

function left() {
  const l = state.left;
  const how = (r) => [r.masked ? "only as a sum over several sites" : Object.entries(r.parts || {}).map(([part, kind]) => `${part} (${kind})`).join(", ")];
  return card([h("span", { cls: "q" }, "3"), "What left this site?"],
    h("div", { cls: "tiles" }, tile(bytes(l.total), "left since the beginning"), tile(bytes(l.largest), "the largest round"), tile(l.limit ? bytes(l.limit) : "–", "limit of the policy for a round"),
      tile(bytes(Object.values(l.days).at(-1) || 0), `on ${Object.keys(l.days).at(-1) || "no day yet"}`)),
    h("h3", {}, "By run and kind"),
    table("Every reply that was handed to the connection, as the journal records it", ["Run", "What", "As", { t: "Times", n: 1 }, { t: "Bytes", n: 1 }],
      l.rows.slice().reverse().map((r) => [r.run, h("span", {}, h("code", {}, r.job), ` ${jobOf(r.job)}`), how(r), r.times, bytes(r.bytes)]), { empty: "Nothing has left." }),
    l.last.length ? h("details", { "data-key": "replies" }, h("summary", {}, "Round by round"), table("The latest first", ["Run", { t: "Round", n: 1 }, "What", { t: "Bytes", n: 1 }, "When"], l.last.map((r) => [r.run, r.round ?? "–", r.job, bytes(r.bytes), when(r.time)]))) : null);
}

const short = (v) => (typeof v === "string" && /^[0-9a-f]{40,}$/.test(v) ? v.slice(0, 16) : typeof v === "object" ? JSON.stringify(v) : v);
function journal() {
  const j = state.journal, words = filter.toLowerCase().split(/\s+/).filter(Boolean);
  const lines = j.last.map((e) => ({ e, text: Object.entries(e).filter(([k]) => !["seq", "event", "time"].includes(k)).map(([k, v]) => `${k} ${short(v)}`).join(" · ") }));
  const shown = lines.filter(({ e, text }) => words.every((w) => `${e.event} ${text}`.toLowerCase().includes(w)));
  return card("Journal",
    j.broken ? call("bad", "The journal was changed", h("p", {}, j.broken)) : null,
    facts(["Entries", `${count(j.count, "entry", "entries")}${j.behind ? ", more are being read" : ""}`], ["Latest hash", h("span", { cls: "mono" }, j.head.slice(0, 32)), h("span", { cls: "why" }, "read it to the coordinator to compare")],
      verified && ["Verified", verified.good ? pill(`complete: ${count(verified.count, "entry", "entries")} since ${when(verified.first)}`, "good") : pill(verified.problem, "bad")]),
    h("div", { cls: "row", "data-key": "journal-row" }, button("Verify the whole journal", "verify"), h("label", { cls: "row" }, "Find", h("input", { type: "search", "data-set": "filter", "data-key": "filter" }))),
    h("div", { cls: "log", tabindex: "0", role: "region", "aria-label": "Entries of the journal", "data-key": "journal-log" }, h("ul", { cls: "plain" }, shown.map(({ e, text }) => h("li", { "data-key": `e${e.seq}` }, h("b", {}, e.event), h("span", { cls: "why" }, `${e.seq} · ${when(e.time)} · ${text.slice(0, 400)}`))))));
}

function policy() {
  const p = state.policy, t = p.table, allow = t.allow || {}, limits = t.limits || {}, need = t.require || {};
  const automatic = t.approve?.automatically || [];
  const lines = [
    automatic.length ? `${count(automatic.length, "method is", "methods are")} approved automatically, by hash.` : "A person approves every study.",
    `Never runs: ${list(allow.never || []) || "nothing is excluded"}.`, `May leave as sums: ${list(allow.stats || []) || "nothing"}.`, `The server may see for this site alone: ${list(allow.gather || []) || "nothing"}.`,
    need.secure ? `Model changes leave only as sums over at least ${need.min_sites ?? 3} sites.` : "Model changes may leave without secure aggregation, so that the server sees this site's.",
    `No training with fewer than ${limits.min_patients ?? 10} patients; counts below ${limits.min_cell ?? 5} are hidden.`,
  ];
  const done = state.results["policy check"];
  return card("Policy", p.error ? call("bad", "The policy cannot be read", h("p", {}, p.error)) : h("ul", { cls: "plain" }, lines.map((l) => h("li", {}, l))),
    check("policy check", "Check the policy file"), done && (done.error ? call("bad", "The policy is invalid, so nothing runs", h("p", {}, done.error)) : h("p", {}, pill("valid", "good"), ` checked ${ago(done.time)}`)),
    h("details", { "data-key": "policy-file" }, h("summary", {}, "The file"), note(h("code", {}, p.path), " is changed with an editor, not here."), h("pre", { tabindex: "0", role: "region", "aria-label": "Policy file" }, p.text)));
}

function budget() {
  const done = state.results["privacy ledgers"], rows = done?.result || [];
  return card("Privacy budget", state.privacy.length ? [
    table("Of each data set, over all studies", ["Data set", { t: "Budget ε", n: 1 }, { t: "δ", n: 1 }, "Unit", { t: "Releases", n: 1 }, { t: "Spent ε", n: 1 }],
      state.privacy.map((p) => { const spent = rows.find((r) => r.data === p.name)?.spent; return p.error ? [p.name, p.error, "", "", "", ""] : [p.name, number(p.budget, 2), String(p.delta), p.unit, p.releases, spent === undefined ? "–" : (Math.ceil(spent * 100 - 1e-9) / 100).toFixed(2)]; })),
    check("privacy ledgers", "Compute what is spent"), done?.error ? note(done.error) : null,
  ] : note("The policy sets no budget, so nothing is counted and replies need no noise. ", h("code", {}, "[privacy]"), " in policy.toml sets one."));
}

function checks() {
  const done = state.results.checks;
  return card("Data and installation", note("Reads the data folder on this machine: ", h("code", {}, state.connection.data || "–")), check("checks", "Run all checks"),
    done && (done.result ? [h("ul", { cls: "plain" }, done.result.map((c) => h("li", {}, pill(c.ok ? "ok" : "failed", c.ok ? "good" : "bad"), ` ${c.check}: ${c.result}`))), note(`checked ${ago(done.time)}`)] : note(done.error)));
}
const check = (what, text) => h("div", { cls: "row", "data-key": `check-${what}` }, button(state.busy.includes(what) ? "Checking" : text, "check", { what }));

const NAMES = { "What would leave this site": "leave", "The data at this site": "data" };
function section(s) {
  const lines = s.lines.map(([depth, kind, text]) => h("li", { cls: `${kind} d${depth}` }, kind === "before" ? "− approved before: " : kind === "now" ? "+ requested now: " : "", text));
  return card(s.title, h("ul", { cls: "lines" }, lines), NAMES[s.title] === "data" && !review.rehearsal ? patients() : null);
}
function patients() {
  if (!here?.done) return note("Counting the patients at this site, on this machine. Nothing is sent.");
  if (here.error && !here.result) return call("bad", "The data could not be counted", h("p", {}, here.error));
  const { patients: counts, problems: wrong } = here.result;
  return [h("p", {}, h("b", {}, "Patients at this site: "), counts ? Object.entries(counts).map(([role, n]) => `${n} ${role}`).join(", ") || "none" : "unknown", " (counted here, not sent)"),
    wrong.length ? call("bad", "The data do not fit this study", h("ul", {}, wrong.map((w) => h("li", {}, w)))) : null];
}
function reading(r) {
  const by = Object.fromEntries(r.sections.map((s) => [s.title, s]));
  const order = ["What is requested now", "What would leave this site", "The data at this site", "How it is run, and with which sites", "What would run here, every round", "Hashes"];
  const compared = r.sections.find((s) => s.title.startsWith("Compared with")), refused = by["Refused by this site, whatever a person decides"];
  const top = order.slice(0, 4).filter((t) => by[t]), low = order.slice(4).filter((t) => by[t]);
  return [
    h("nav", { "aria-label": "Back" }, h("a", { href: "#/" }, "← Hospital")),
    h("div", { cls: "head" }, h("div", { cls: "grow" }, h("h1", {}, title(r)), note(`${list(r.runs)} · arrived ${when(r.seen)}`)), pill(r.state, r.state === "approved" ? "good" : r.state === "refused" ? "bad" : "warn")),
    r.rehearsal ? call("", "A rehearsal", h("p", {}, "Every site trains on synthetic points. No patient file is opened, and no result is real.")) : null,
    refused ? call("bad", refused.title, h("ul", {}, refused.lines.map(([, , text]) => h("li", {}, text)))) : null,
    r.stale ? call("", "Polyclinic was changed at this site since the study arrived", h("p", {}, "It cannot be approved until the server offers it again.")) : null,
    r.state !== "waiting" ? note(r.headline) : null,
    compared ? section(compared) : card("Compared with earlier studies", note("No study of this kind was approved here before: everything is new.")),
    h("div", { cls: "cols two" }, top.map((t) => section(by[t]))),
    low.map((t) => section(by[t])),
    h("details", { cls: "card", "data-key": "request" }, h("summary", {}, "The whole request, as it arrived"), r.request.map((text) => h("pre", { tabindex: "0", role: "region", "aria-label": "Request" }, pretty(text)))),
    may() ? form(r) : note("This link may look only: nothing can be decided with it."),
  ];
}
const pretty = (text) => JSON.stringify(JSON.parse(text), null, 1);
const form = (r) => h("form", { cls: "card form", "data-do": "decide", "data-key": "decide" },
  h("h2", {}, r.state === "waiting" ? "Decide" : "Change the decision"),
  h("p", { cls: problem ? "call bad" : "", role: "alert", "data-key": "problem" }, problem),
  h("label", { cls: "tick", "data-key": "read" }, h("input", { type: "checkbox", name: "read", "data-key": "read-input" }), h("span", {}, "I have read what would run and what would leave this site")),
  h("label", { cls: "field", "data-key": "by" }, h("span", {}, "Your name"), h("input", { name: "by", autocomplete: "name", maxlength: 100, "data-key": "by-input" })),
  h("label", { cls: "field", "data-key": "reason" }, h("span", {}, "Reason, such as the number of the ethics vote. The server receives the reason of a refusal."), h("input", { name: "reason", autocomplete: "off", maxlength: 500, "data-key": "reason-input" })),
  h("div", { cls: "row", "data-key": "buttons" }, h("button", { cls: "main", name: "state", value: "approved", disabled: busy || r.problems.length > 0 || r.stale }, "Approve exactly this"), h("button", { cls: "danger", name: "state", value: "refused", disabled: busy }, "Refuse")),
  h("p", { cls: "muted", "data-key": "signed" }, `Signed with this site's key and recorded in its journal, with the name, the account ${state.account} and the hash `, h("code", {}, r.shown.slice(0, 16)), " of what is shown here. It applies from the next message on."));

export const query = () => "";
