// Curves, drawn by uPlot. Lines differ by color and by dashes, and the legend shows each line's last value.
import uPlot from "./vendor/uPlot.js";
import { h } from "./dom.js";
import { number } from "./format.js";

const LIGHT = ["#0b6b6b", "#b84e08", "#5b4bbd", "#a8125e", "#1d63c4", "#3c7d22", "#7a4b12", "#5a6b80"];
const DARK = ["#4fc4be", "#f2a35e", "#a99cf5", "#f073b0", "#78b0ff", "#8fd16f", "#d9a86a", "#a9bacb"];
const DASH = [[], [7, 4], [2, 3], [9, 3, 2, 3], [14, 4], [4, 2], [1, 4], [12, 3, 4, 3]];
const root = document.documentElement;
const dark = () => root.dataset.theme === "dark" || (root.dataset.theme !== "light" && matchMedia("(prefers-color-scheme: dark)").matches);
const css = (name) => getComputedStyle(root).getPropertyValue(name).trim();
const color = (i) => (dark() ? DARK : LIGHT)[i % 8];

export class Chart {
  constructor() {
    this.el = h("div", { cls: "plot", "data-keep": "", "data-key": "plot", role: "img" });
    this.tip = h("p", { cls: "tip", "data-keep": "", "data-key": "tip" }, " ");
    this.series = [];
    new ResizeObserver(() => this.size()).observe(this.el);
  }

  size() {
    if (this.plot && this.el.clientWidth && this.el.clientWidth !== this.width) {
      this.width = this.el.clientWidth;
      this.plot.setSize({ width: this.width, height: this.height() });
    }
  }

  height() { return this.el.clientWidth < 520 ? 250 : 320; }

  // series: [{name, points: Map(round -> value), strong}]
  draw(series, { x, y }) {
    this.series = series;
    const rounds = [...new Set(series.flatMap((s) => [...s.points.keys()]))].sort((a, b) => a - b);
    const data = [rounds, ...series.map((s) => rounds.map((r) => s.points.get(r) ?? null))];
    const shape = JSON.stringify([series.map((s) => s.name), dark(), x, y, rounds.length < 25]);
    this.el.setAttribute("aria-label", `${y} by ${x}. ${series.map((s) => `${s.name}: last ${number([...s.points.values()].at(-1))}`).join("; ")}`);
    if (this.plot && this.shape === shape) {
      this.plot.setData(data);
      return;
    }
    this.plot?.destroy();
    this.shape = shape;
    this.width = this.el.clientWidth;
    const text = css("--muted"), grid = css("--grid"), font = "12px system-ui, sans-serif";
    const axis = { stroke: text, font, labelFont: font, grid: { stroke: grid, width: 1 }, ticks: { stroke: grid } };
    this.plot = new uPlot({
      width: this.width || 600, height: this.height(), padding: [10, 12, 0, 0], legend: { show: false },
      scales: { x: { time: false, range: (u, low, high) => [low, Math.max(high, low + 1)] } },
      cursor: { drag: { x: false, y: false } },
      axes: [{ ...axis, label: x, size: 34, labelSize: 18, labelGap: 0, incrs: [1, 2, 5, 10, 20, 50, 100, 200, 500, 1000] }, { ...axis, label: y, size: 56, labelSize: 20 }],
      series: [{}, ...series.map((s, i) => ({ label: s.name, stroke: color(i), width: s.strong ? 3 : 1.8, dash: DASH[i % 8], spanGaps: true, points: { show: rounds.length < 25, size: 5, fill: color(i) } }))],
      hooks: { setCursor: [(u) => this.say(u)] },
    }, data, this.el);
  }

  say(u) {
    const i = u.cursor.idx;
    this.tip.textContent = i === null || i === undefined ? " " : `${u.axes[0].label} ${u.data[0][i]}: ${this.series.map((s, k) => `${s.name} ${number(u.data[k + 1][i])}`).join(" · ")}`;
  }

  legend() {
    return h("ul", { cls: "legend" }, this.series.map((s, i) => h("li", {},
      h("svg", { width: 26, height: 8, "aria-hidden": "true" }, h("line", { x1: 0, y1: 4, x2: 26, y2: 4, stroke: color(i), "stroke-width": s.strong ? 4 : 2.5, "stroke-dasharray": DASH[i % 8].join(" ") || null })),
      h("span", {}, s.name), h("b", {}, number([...s.points.values()].at(-1))))));
  }
}
