// The researcher's page.
import { Chart } from "./chart.js";
import { bar, button, call, card, h, note, pill, table, tile } from "./dom.js";
import { ago, bytes, count, list, number, span, when } from "./format.js";
import { ask, may, render, route } from "./main.js";

const chart = new Chart();
const rows = new Map(), chosen = new Set();
let house = null, run = null, arms = new Map(), search = "", shown = 30, view_ = "methods", seed = "mean", metric = "", armed = "", deleting = "";

const KIND = { running: "good", stopped: "warn", finished: "" };
export const name = () => (run && route().startsWith("/run/") ? run.title : "Runs");
export const query = (path) => (path?.startsWith("/run/") ? `run=${encodeURIComponent(path.slice(5))}&metric=${encodeURIComponent(metric)}` : "");
export function reset() {
  run = null;
  arms = new Map();
}
export function take(event, data) {
  if (event === "facts") house = data;
  if (event === "rows") {
    if (data.whole) rows.clear(); // a new stream: what was deleted before it began is not among its rows
    data.gone.forEach((id) => { rows.delete(id); chosen.delete(id); });
    data.rows.forEach((row) => rows.set(row.id, row));
  }
  if (event === "run") {
    if (run && run.generation !== data.generation) arms = new Map();
    run = data;
  }
  if (event === "arms") {
    for (const arm of data) {
      const before = arms.get(arm.name)?.rows.slice(0, arm.from) || [];
      arms.set(arm.name, { ...arm, rows: [...before, ...arm.rows] });
    }
  }
}
const ended = new Set();
export function alerts() {
  const failed = (house?.children || []).filter((c) => c.code !== null && ![0, 3, 130, 143].includes(c.code)).map((c) => ({ id: `failed ${c.number} ${c.begun}`, text: `${c.what} ${c.about} failed.` }));
  for (const r of rows.values()) if (r.state === "running") ended.add(r.id);
  const done = [...rows.values()].filter((r) => r.state === "finished" && ended.has(r.id)).map((r) => ({ id: `finished ${r.id}`, text: `${r.title} is finished.` }));
  return [...failed, ...done];
}
export function set(what, value, data) {
  if (what === "search") { search = value; shown = 30; }
  if (what === "view") view_ = value;
  if (what === "seed") seed = value;
  if (what === "metric" && value !== metric) {
    metric = value;
    window.dispatchEvent(new HashChangeEvent("hashchange"));
  }
  if (what === "choose") value ? chosen.add(data.run) : chosen.delete(data.run);
}
export const themed = () => { chart.shape = ""; };

export const doing = {
  stop(data) { // a second press confirms
    if (armed === data.run) {
      armed = "";
      ask("stop", { run: data.run });
    } else {
      armed = data.run;
      setTimeout(() => { armed = ""; render(); }, 6000);
    }
    render();
  },
  resume: (data) => ask("resume", { run: data.run }),
  report: (data) => ask("report", { run: data.run }),
  start(data, form) { if (form.elements.study.value) ask("start", { study: form.elements.study.value }); },
  async file(data) {
    const tab = window.open("about:blank", "_blank"); // opened by the press itself, or the browser would block it
    const result = await ask("file", { run: data.run, file: data.file });
    if (result && tab) tab.location.replace(`/report/${result.ticket}`);
    else tab?.close();
  },
  compare() { location.hash = `#/compare/${[...chosen].map(encodeURIComponent).join(",")}`; },
  test: (data) => ask("compare", { runs: data.runs.split("\n") }),
  more() { shown += 100; render(); },
  remove(data) { deleting = deleting === data.run ? "" : data.run; render(); },
  async delete(data, form) {
    if (await ask("delete", { run: data.run, confirm: form.elements.confirm.value.trim() })) {
      deleting = "";
      location.hash = "#/";
    }
  },
};

const operate = (r) => may() && [
  r.state === "running" && button(armed === r.id ? "Press again to stop" : "Stop", "stop", { run: r.id }, armed === r.id ? "danger" : ""),
  r.state === "stopped" && r.resumable && button("Resume", "resume", { run: r.id }),
];
const progress = (r) => h("span", {}, bar(r.done, r.total, `${Math.floor((100 * r.done) / Math.max(1, r.total))} %`, `Progress of ${r.id}`),
  h("span", { cls: "why" }, r.reading ? "its records are being read" : `${r.tested} of ${count(r.runs, "method run")} tested${r.left ? ` · about ${span(r.left)} left` : ""}`));

function home() {
  const words = search.toLowerCase().split(/\s+/).filter(Boolean), order = { running: 0, stopped: 1, finished: 1 };
  const all = [...rows.values()].filter((r) => words.every((w) => `${r.id} ${r.title} ${r.state} ${r.best?.label || ""}`.toLowerCase().includes(w)))
    .sort((a, b) => order[a.state] - order[b.state] || b.created.localeCompare(a.created));
  const running = [...rows.values()].filter((r) => r.state === "running").length, disk = [...rows.values()].reduce((n, r) => n + r.disk, 0);
  return [
    h("div", { cls: "head" }, h("div", { cls: "grow" }, h("h1", {}, "Runs"), note(`${count(rows.size, "run")} in `, h("code", {}, house.root), ` · ${running} running`)),
      h("div", { cls: "row" }, h("label", { cls: "row" }, "Find", h("input", { type: "search", "data-set": "search", "data-key": "search", placeholder: "name, method, state" })),
        h("button", { "data-do": "compare", type: "button", disabled: chosen.size < 2 }, `Compare${chosen.size ? ` (${chosen.size})` : ""}`))),
    h("div", { cls: "tiles" }, tile(String(running), "running"), tile(String(rows.size), "runs"), tile(bytes(disk), "in run folders"), tile(bytes(house.free), "free on this disk", house.free < 2e9 ? "bad" : "")),
    starter(), commands(),
    h("section", { cls: "card" }, table("Running runs first, then the latest. Values are of validation data.",
      ["Run", "State", "Progress", "Best so far", "Size", "Faults", { t: "Moved", n: 1 }, { t: "Disk", n: 1 }, "Begun", may() ? "Actions" : ""].filter(Boolean),
      all.slice(0, shown).map((r) => [
        h("span", { cls: "tick" }, h("input", { type: "checkbox", "data-set": "choose", "data-run": r.id, "data-key": `choose-${r.id}`, "aria-label": `Compare ${r.id}` }),
          h("span", { cls: "v" }, h("a", { href: `#/run/${encodeURIComponent(r.id)}` }, r.title), h("span", { cls: "why mono" }, r.id))),
        pill(r.state, KIND[r.state]), progress(r),
        r.best ? h("span", {}, h("b", {}, number(r.best.value)), ` ${r.metric}`, h("span", { cls: "why" }, r.best.label)) : "–",
        h("span", { cls: "why" }, `${count(r.methods, "method")}, ${count(r.seeds, "seed")}, ${count(r.sites, "site")}`),
        r.faults ? pill(String(r.faults), "bad") : "none", bytes(r.bytes), bytes(r.disk), ago(r.created), may() && h("span", { cls: "row" }, operate(r)),
      ].filter((cell) => cell !== false)), { keys: all.slice(0, shown).map((r) => r.id), empty: rows.size ? "No run matches." : "No runs yet." })),
    all.length > shown ? h("div", { cls: "row", "data-key": "more" }, button(`Show more (${all.length - shown})`, "more")) : null,
  ];
}

function starter() {
  if (!may()) return null;
  return h("form", { cls: "card", "data-do": "start", "data-key": "start" }, h("h2", {}, "Start a study"), house.studies.length
    ? h("div", { cls: "row" }, h("label", { cls: "row" }, "Study file", h("select", { name: "study", "data-key": "study" }, house.studies.map((s) => h("option", { value: s, "data-key": `study-${s}` }, s)))), h("button", { cls: "main" }, "Run"))
    : null, note(house.studies.length ? "Files in " : "There is no study file in ", h("code", {}, house.folder), ". ", h("code", {}, "polyclinic new"), " writes one."));
}
function commands() {
  const all = house.children;
  if (!all.length) return null;
  const state = (c) => (c.code === null ? pill("running", "good") : [0, 3].includes(c.code) ? pill(c.code ? "stopped" : "done") : pill(`failed, code ${c.code}`, "bad"));
  const failed = all.some((c) => c.code !== null && ![0, 3].includes(c.code));
  return h("details", { cls: "card", "data-key": "commands", open: failed || all.some((c) => c.code === null) }, h("summary", {}, `Commands of this console (${all.length})`),
    h("ul", { cls: "plain" }, all.slice(0, 8).map((c) => h("li", { "data-key": `c${c.number}` }, state(c), " ", h("code", {}, c.command), h("span", { cls: "why" }, ago(c.begun)),
      c.output && c.code !== 0 ? h("pre", { tabindex: "0", role: "region", "aria-label": `Output of ${c.what}` }, c.output) : null))));
}

const mean = (values) => {
  const known = values.filter((v) => typeof v === "number");
  return known.length ? known.reduce((a, b) => a + b, 0) / known.length : null;
};
const training = () => run.site.filter((s) => s.role === "training").map((s) => s.name);
const better = (a, b) => (run.higher ? b - a : a - b);
function curve(of, pick) {
  const by = new Map();
  for (const arm of of) for (const [round, sites] of arm.rows) {
    const v = pick(sites);
    if (typeof v === "number") by.set(round, [...(by.get(round) || []), v]);
  }
  return new Map([...by].sort((a, b) => a[0] - b[0]).map(([r, v]) => [r, mean(v)]));
}
function series() {
  const all = [...arms.values()].filter((a) => seed === "mean" || String(a.seed) === seed), sites = training();
  if (view_ === "methods" || !run.method.some((m) => m.label === view_)) {
    return run.method.map((m) => ({ name: m.label, points: curve(all.filter((a) => a.label === m.label), (s) => mean(sites.map((n) => s[n]))) })).filter((s) => s.points.size);
  }
  const own = all.filter((a) => a.label === view_);
  return [{ name: "mean", strong: true, points: curve(own, (s) => mean(sites.map((n) => s[n]))) }, ...run.site.map((s) => ({ name: s.name, points: curve(own, (v) => v[s.name]) }))].filter((s) => s.points.size);
}
function summary() {
  const sites = training();
  return run.method.map((m) => {
    const own = [...arms.values()].filter((a) => a.label === m.label), scored = own.filter((a) => a.best !== null);
    const site = Object.fromEntries(run.site.map((s) => [s.name, mean(scored.map((a) => a.best_sites[s.name]))]));
    const worst = sites.filter((n) => site[n] !== null).sort((a, b) => better(site[b], site[a]))[0];
    const rounds = own.reduce((n, a) => n + a.round, 0), spent = Math.max(0, ...own.map((a) => a.epsilon || 0));
    const test = run.state === "finished" ? mean(own.map((a) => mean(sites.map((n) => a.test?.[n])))) : null;
    return { ...m, own, best: mean(scored.map((a) => a.best)), site, worst, test, rounds, spent, moved: own.reduce((n, a) => n + a.bytes, 0), pace: rounds ? own.reduce((n, a) => n + a.wall, 0) / rounds : null };
  });
}

function one() {
  const all = summary(), federated = all.filter((r) => !r.baseline && r.best !== null).sort((a, b) => better(a.best, b.best));
  const top = federated[0], most = all.map((r) => r.best).filter((v) => v !== null).sort(better)[0], lines = series(), priv = all.some((r) => r.spent);
  chart.series = lines;
  const back = h("nav", { "aria-label": "Back" }, h("a", { href: "#/" }, "← All runs"));
  const busy = house.children.filter((c) => c.about === run.id && (c.code === null || ![0, 3].includes(c.code)));
  return [back,
    h("div", { cls: "head" }, h("div", { cls: "grow" }, h("h1", {}, run.title), note(h("span", { cls: "mono" }, run.id), ` · ${run.task} · ${run.parameters.toLocaleString("en-US")} parameters · begun ${when(run.created)}`)),
      pill(run.state, KIND[run.state]), h("div", { cls: "row" }, operate(run),
        run.report ? button("Open report", "file", { run: run.id, file: "report/report.html" }, "main") : null,
        may() && run.state !== "running" ? button(run.report ? "Write report again" : "Write report", "report", { run: run.id }) : null)),
    run.data.simulated ? call("", "", h("p", {}, h("b", {}, "Simulated sites. "), run.data.simulated)) : null,
    run.state === "stopped" ? call("", "Stopped", h("p", {}, `Every complete round is saved. ${run.resumable ? "It continues after the last one, with bit-identical results." : "The command polyclinic run FILE --resume continues it with the other studies of its file."}`)) : null,
    busy.map((c) => call(c.code === null ? "good" : "bad", c.code === null ? `polyclinic ${c.what} runs` : `polyclinic ${c.what} failed`, c.output ? h("pre", { tabindex: "0", role: "region", "aria-label": "Output" }, c.output) : null)),
    h("div", { cls: "tiles" }, tile(`${run.done} / ${run.total}`, "rounds of all method runs"), tile(`${run.tested} / ${run.runs}`, "method runs tested"),
      tile(top ? number(top.best) : "–", top ? `best ${run.metric}: ${top.label}` : `best ${run.metric}`), tile(top?.worst ? number(top.site[top.worst]) : "–", top?.worst ? `its worst site: ${top.worst}` : "worst site"),
      tile(bytes(run.bytes), "sent and received"), tile(bytes(run.disk), "on disk"), run.state === "running" ? tile(span(run.left), "left, about") : tile(String(run.faults), "faults", run.faults ? "bad" : "")),
    h("div", { cls: "cols wide" },
      h("section", { cls: "card", "data-key": "curves" }, h("h2", {}, `${run.metric} on validation data`), h("div", { cls: "row" },
        h("label", { cls: "row" }, "Show", h("select", { "data-set": "view", "data-key": "view" }, h("option", { value: "methods" }, "methods, mean of sites"), run.method.map((m) => h("option", { value: m.label }, `sites under ${m.label}`)))),
        h("label", { cls: "row" }, "Seed", h("select", { "data-set": "seed", "data-key": "seed" }, h("option", { value: "mean" }, "mean"), run.seed.map((s) => h("option", { value: s }, s)))),
        h("label", { cls: "row" }, "Metric", h("select", { "data-set": "metric", "data-key": "metric" }, run.metrics.map((m) => h("option", { value: m === run.primary ? "" : m, selected: m === run.metric }, m === run.primary ? `${m} (primary)` : m))))),
      chart.el, chart.tip, lines.length ? chart.legend() : note("The first scores arrive with the first scored round."),
      h("details", { "data-key": "numbers" }, h("summary", {}, "As numbers"), table(`${run.metric} by round`, ["Round", ...lines.map((l) => ({ t: l.name, n: 1 }))],
        [...new Set(lines.flatMap((l) => [...l.points.keys()]))].sort((a, b) => b - a).slice(0, 100).map((r) => [r, ...lines.map((l) => number(l.points.get(r) ?? null))]), { stack: false }))),
      card("Methods", table(`At the best round of each method run, mean over ${count(run.seed.length, "seed")}. ${run.state === "finished" ? "" : "Test scores stay closed until every method run is done, so that no method is chosen by them."}`,
        ["Method", { t: "Validation", n: 1 }, { t: "Test", n: 1 }, "Worst site", { t: "Moved", n: 1 }, { t: "s/round", n: 1 }, ...(priv ? [{ t: "ε", n: 1 }] : [])],
        [...all].sort((a, b) => (a.best === null) - (b.best === null) || better(a.best, b.best)).map((r) => [r.label, r.best === most && most !== undefined ? h("b", {}, number(r.best)) : number(r.best), r.test === null ? "closed" : number(r.test),
          r.worst ? `${number(r.site[r.worst])} ${r.worst}` : "–", bytes(r.moved), number(r.pace, 2), ...(priv ? [r.spent ? (Math.ceil(r.spent * 100 - 1e-9) / 100).toFixed(2) : "–"] : [])])))),
    h("div", { cls: "cols two" },
      card("Sites", table(top ? `Under ${top.label}, the best federated method on validation data, and under local training` : "Scores follow with the first round", ["Site", "Role", { t: "Patients", n: 1 }, { t: run.metric, n: 1 }, { t: "Local", n: 1 }],
        run.site.map((s) => {
          const v = top?.site[s.name] ?? null, alone = all.find((r) => r.name === "local")?.site[s.name] ?? null;
          return [s.name, s.role, Object.values(s.patients).reduce((a, b) => a + b, 0), v !== null && alone !== null && better(v, alone) > 0 ? h("span", {}, number(v), " ", pill("below local", "bad")) : number(v), number(alone)];
        }))),
      card("Method runs", table("Rounds of each method and seed; the test is opened once, at the end", ["Method", ...run.seed.map((n) => `seed ${n}`)], run.method.map((m) => [m.label, ...run.seed.map((n) => cell(m, n))]), { keys: run.method.map((m) => m.label) }))),
    h("div", { cls: "cols two" },
      card("Faults", run.fault.length ? table("Replies that were lost or refused, the latest first", ["Site", "Method run", { t: "Round", n: 1 }, "Reason"], run.fault.map((f) => [f.site, f.method, f.round, f.reason]).reverse()) : note("None: every site that was asked has answered, and every answer was used.")),
      card("What leaves a site", h("ul", { cls: "plain" }, run.method.map((m) => h("li", {}, h("b", {}, m.label), `: ${m.leaves || "the change of the model"}`))))),
    h("div", { cls: "cols two" },
      card("Files", h("ul", { cls: "plain" }, run.files.map(([file, size]) => h("li", { cls: "row", "data-key": file }, h("span", { cls: "grow mono" }, file), h("span", { cls: "muted" }, bytes(size)), button(file.endsWith(".html") ? "Open" : "Download", "file", { run: run.id, file }))))),
      card("Journal", h("div", { cls: "log", tabindex: "0", role: "region", "aria-label": "Journal" }, h("ul", { cls: "plain mono" }, [...run.events].reverse().map((e) => h("li", { "data-key": `e${e.seq}` }, `${e.seq} ${e.event} ${[e.method, e.seed !== undefined && `seed ${e.seed}`, e.round && `round ${e.round}`].filter(Boolean).join(", ")}`)))))),
    may() && run.state !== "running" ? h("section", { cls: "card", "data-key": "clean" }, h("h2", {}, "Clean up"), note(`This run takes ${bytes(run.disk)}. Deleting it removes its models, records and report; nothing brings them back.`), button(deleting === run.id ? "Keep it" : "Delete this run", "remove", { run: run.id }, "danger"),
      deleting === run.id ? h("form", { cls: "form", "data-do": "delete", "data-run": run.id, "data-key": "delete" }, h("label", { cls: "field", "data-key": "confirm" }, h("span", {}, `Type its name to confirm: ${run.id}`), h("input", { name: "confirm", autocomplete: "off", "data-key": "confirm-input" })), h("div", {}, h("button", { cls: "danger" }, "Delete for good"))) : null) : null,
  ];
}
function cell(m, n) {
  const own = [...arms.values()].filter((a) => a.label === m.label && a.seed === n), total = run.rounds * Math.max(1, own.length);
  const done = own.reduce((t, a) => t + (a.tested ? run.rounds : a.round), 0), now = own.map((a) => a.now).find((a) => a?.asked);
  const text = own.length && own.every((a) => a.tested) ? "tested" : own.some((a) => a.trials && !a.round) ? `trial ${Math.max(...own.map((a) => a.trials))}` : done || now ? `${done} / ${total}` : "waits";
  return h("span", {}, bar(done, total, text, `${m.label}, seed ${n}`), now ? h("span", { cls: "why" }, `round ${now.round}: ${now.arrived} of ${now.asked} sites answered${now.waits.length && now.waits.length < 4 ? `; ${list(now.waits)} still computes` : ""}${Object.entries(now.steps).slice(0, 8).map(([site, [k, of]]) => ` · ${site}: minibatch ${k} of ${of}`).join("")}`) : null);
}

function compare(ids) {
  const runs = ids.map((id) => rows.get(id)).filter(Boolean), key = runs.map((r) => r.id).join(" "), done = house.compared[key];
  const busy = house.children.some((c) => c.what === "compare" && c.about === key && c.code === null), closed = runs.filter((r) => r.state !== "finished");
  return [h("nav", { "aria-label": "Back" }, h("a", { href: "#/" }, "← All runs")), h("h1", {}, "Compare runs"),
    card("On validation data", table("The best federated method of each run", ["Run", "State", "Best method", { t: "Value", n: 1 }, "Metric", { t: "Moved", n: 1 }, { t: "Sites", n: 1 }],
      runs.map((r) => [h("a", { href: `#/run/${encodeURIComponent(r.id)}` }, r.title), r.state, r.best?.label || "–", number(r.best?.value), r.metric, bytes(r.bytes), r.sites]))),
    card("On test data, paired by patient", closed.length ? note(`${list(closed.map((r) => r.title))} ${closed.length > 1 ? "are" : "is"} not finished: test data are compared when every run is.`)
      : [may() ? h("div", { cls: "row", "data-key": "test" }, h("button", { "data-do": "test", type: "button", "data-runs": runs.map((r) => r.id).join("\n"), disabled: busy }, busy ? "Comparing" : "Compare on the same test patients")) : null,
        done?.error ? call("bad", "These runs cannot be compared", h("p", {}, done.error)) : null,
        done?.rows ? table("Each method against the reference, on the same test patients", ["Run", "Method", { t: "Mean", n: 1 }, { t: "Difference", n: 1 }, "Result"], done.rows.map((r) => [r.run, r.method, number(r.mean?.value), r.difference ? `${r.difference.value >= 0 ? "+" : ""}${number(r.difference.value)}` : "–", r.verdict])) : null])];
}

export function view(path) {
  if (!house) return [h("p", { cls: "empty" }, "Loading")];
  if (path.startsWith("/run/")) {
    const id = path.slice(5);
    if (run?.id === id && arms.size) return one();
    return [h("nav", { "aria-label": "Back" }, h("a", { href: "#/" }, "← All runs")), h("p", { cls: "empty" }, rows.has(id) ? "Loading" : "There is no such run.")];
  }
  if (path.startsWith("/compare/")) return compare(location.hash.slice("#/compare/".length).split(",").map(decodeURIComponent));
  return home();
}
export function after() {
  if (run && route().startsWith("/run/") && chart.el.isConnected) chart.draw(chart.series, { x: "round", y: run.metric });
}
