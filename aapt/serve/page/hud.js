// The figures over the image, and the keys that light up when a frame obeys them.

import { percentile } from "./receipts.js";

const RECEIPT_MS = 1600;
const BARS = 40; // key presses in the little chart

/** Draws receipts into `hud` (a dl), key caps and the line that names the latest press. */
export class Hud {
  #timer = 0;

  constructor(hud, keys, line, receipts) {
    this.hud = hud;
    this.line = line;
    this.receipts = receipts;
    this.caps = new Map([...keys.children].map((cap) => [cap.dataset.key, cap]));
    // The pairs are the median and the 99th percentile.
    this.rows = {
      fps: row(hud, "frames/s"),
      step: row(hud, "step p50/99"),
      share: row(hud, "of a period"),
      key: row(hud, "key to pixel"),
      queue: row(hud, "buffered"),
    };
    this.chart = hud.appendChild(document.createElement("canvas"));
    this.chart.setAttribute("role", "img");
    this.chart.setAttribute("aria-label", "Key to pixel of the latest presses");
    Object.assign(this.chart, { width: 4 * BARS, height: 36 });
    this.period = 1000 / 6;
  }

  show(on) {
    this.hud.hidden = !on;
    this.draw(0);
  }

  /** Writes the figures; `queued` is the pacer's backlog in milliseconds. */
  draw(queued) {
    if (this.hud.hidden) return;
    const { fps, steps, keys, redone } = this.receipts;
    const pair = (samples) => [percentile(samples, 0.5), percentile(samples, 0.99)];
    const [step50, step99] = pair(steps);
    const [key50, key99] = pair(keys);
    this.rows.fps.textContent = fps === null ? "–" : fps.toFixed(1);
    this.rows.step.textContent = step50 === null ? "–" : `${Math.round(step50)} / ${Math.round(step99)} ms`;
    this.rows.share.textContent = step50 === null
      ? "–" : `${Math.round((100 * step50) / this.period)} % of ${Math.round(this.period)} ms`;
    this.rows.key.textContent = key50 === null
      ? "no press yet" : `${Math.round(key50)} / ${Math.round(key99)} ms`;
    this.rows.queue.textContent = `${Math.round(queued)} ms${redone ? `, ${redone} redone` : ""}`;
    Object.assign(this.hud.dataset, {
      fps, step50, step99, key50, key99, redone, presses: keys.length, period: this.period,
    });
    this.#bars(keys.slice(-BARS));
  }

  /** Outlines the keys that are down. */
  held(keys) {
    for (const [key, cap] of this.caps) {
      cap.classList.toggle("held", keys.includes(key));
      if (!keys.includes(key)) cap.classList.remove("obeyed");
    }
  }

  /** Fills the keys that a painted frame was the first to obey, and says how long it took. */
  obeyed(presses, frame) {
    for (const { key } of presses) this.caps.get(key)?.classList.add("obeyed");
    const { key, ms } = presses.at(-1);
    const name = key[0].toUpperCase() + key.slice(1);
    const strong = document.createElement("b");
    strong.textContent = `${name} in ${Math.round(ms)} ms`;
    this.line.replaceChildren(strong, ` frame ${frame.index + 1} of step ${frame.step}`);
    this.line.hidden = false;
    clearTimeout(this.#timer);
    this.#timer = setTimeout(() => { this.line.hidden = true; }, RECEIPT_MS);
  }

  #bars(samples) {
    const { width, height } = this.chart;
    const context = this.chart.getContext("2d");
    const style = getComputedStyle(this.hud);
    const most = Math.max(1.2 * this.period, ...samples);
    const y = (ms) => height - (ms / most) * (height - 2);
    context.clearRect(0, 0, width, height);
    context.fillStyle = style.getPropertyValue("--accent");
    samples.forEach((ms, index) => context.fillRect(4 * index, y(ms), 3, height - y(ms)));
    context.fillStyle = style.getPropertyValue("--hud-line");
    context.fillRect(0, y(this.period), width, 1);
  }
}

function row(list, name) {
  const group = document.createElement("div");
  const value = document.createElement("dd");
  const term = document.createElement("dt");
  term.textContent = name;
  group.append(term, value);
  list.append(group);
  return value;
}
