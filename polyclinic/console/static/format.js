export const number = (v, digits = 3) => (typeof v !== "number" || !Number.isFinite(v) ? "–" : v.toFixed(digits));
export const bytes = (n) => {
  if (!n) return "0 B";
  const i = Math.min(4, Math.floor(Math.log10(n) / 3)), v = n / 1000 ** i;
  return `${v.toFixed(i && v < 100 ? 1 : 0)} ${["B", "kB", "MB", "GB", "TB"][i]}`;
};
export const span = (s) => {
  if (typeof s !== "number" || !Number.isFinite(s)) return "–";
  if (s < 90) return `${Math.round(s)} s`;
  if (s < 5400) return `${Math.round(s / 60)} min`;
  return s < 172800 ? `${(s / 3600).toFixed(1)} h` : `${Math.round(s / 86400)} days`;
};
const time = (when) => (typeof when === "number" ? when * 1000 : Date.parse(when));
// The age, in steps that change a page seldom.
export const ago = (when) => {
  if (!when) return "never";
  const s = Math.max(0, (Date.now() - time(when)) / 1000);
  return s < 20 ? "just now" : `${s < 90 ? `${Math.round(s / 10) * 10} s` : span(s)} ago`;
};
export const when = (at) => (at ? new Date(time(at)).toLocaleString("en-GB", { dateStyle: "medium", timeStyle: "short" }) : "–");
export const count = (n, one, many = `${one}s`) => `${n.toLocaleString("en-US")} ${n === 1 ? one : many}`;
export const list = (items) => items.join(", ");
