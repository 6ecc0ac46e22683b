// The timeline: branches drawn as a tree over time, scrubbed by pointer and by keys.

const SVG = "http://www.w3.org/2000/svg";
const ROW = 22, TOP = 16, BOTTOM = 20, SIDE = 14;
const SHORTEST = 48; // steps the whole width holds at least
const TICKS = [1, 2, 5, 10, 15, 30, 60, 120, 300, 600]; // seconds between two marks of the ruler
export const COLOURS = 6; // of branches, in the style sheet

/**
 * Draws `branches` and reports `onScrub(branch, step, done)`: while a pointer drags, and at its
 * end with `done`. `preview(branch, step)` resolves to a bitmap for the image under the pointer.
 */
export class Timeline {
  #drag = null; // {branch, step} under the pointer that is down
  #scrubbed = false; // by this drag
  #drawn = 0;
  #hover = 0;
  #unit = 1;
  #width = 0;
  #span = SHORTEST;
  #row = 0; // of the playhead, as last drawn
  head = { branch: 0, step: 0 };
  seconds = 1 / 6; // of a step
  lanes = null; // branches of a split
  marks = []; // {branch, step, kind: "prompt" | "key"}

  constructor(element, thumb, branches, { onScrub, preview }) {
    this.element = element;
    this.svg = element.querySelector("svg");
    this.thumb = thumb;
    this.branches = branches;
    this.onScrub = onScrub;
    this.preview = preview;
    new ResizeObserver(() => {
      this.#unpeek();
      this.draw();
    }).observe(element);
    this.#followPointer();
    element.addEventListener("keydown", (event) => this.#key(event));
  }

  /** Draws at the next frame; calls in between are one drawing. */
  draw() {
    this.#drawn ||= requestAnimationFrame(() => {
      this.#drawn = 0;
      this.#draw();
    });
  }

  /** Goes to the branch drawn above (-1) or below (+1). */
  stepBranch(by) {
    const row = this.branches.get(this.head.branch)?.row ?? 0;
    const next = this.branches.rows[row + by];
    if (next) this.onScrub(next.id, next.to_step, true);
  }

  /** Measures the element, before anything is written: pixels of a length of 1 in the drawing
   * (they grow with the letters), its width, and the steps in it. */
  #measure() {
    this.#unit = parseFloat(getComputedStyle(document.documentElement).fontSize) / 16;
    this.#width = this.element.clientWidth / this.#unit;
    this.#span = SHORTEST;
    while (this.#span < this.branches.lastStep) this.#span *= 1.5;
  }

  #x(step) {
    return SIDE + (step / this.#span) * (this.#width - 2 * SIDE);
  }

  /** The step under a pointer, which may lie outside of any branch. */
  #stepAt(event) {
    const x = (event.clientX - this.svg.getBoundingClientRect().left) / this.#unit;
    return Math.round(((x - SIDE) / (this.#width - 2 * SIDE)) * this.#span);
  }

  #draw() {
    this.#measure();
    const { rows } = this.branches;
    const height = TOP + Math.max(1, rows.length) * ROW + BOTTOM;
    this.svg.setAttribute("viewBox", `0 0 ${this.#width} ${height}`);
    this.svg.setAttribute("width", this.element.clientWidth);
    this.svg.setAttribute("height", height * this.#unit);
    const parts = [...this.#ruler(height)];
    const live = new Set((this.lanes ?? [this.head.branch]).flatMap(
      (id) => this.branches.lineage(id).map((branch) => branch.id)));
    for (const branch of rows) parts.push(...this.#line(branch, live.has(branch.id)));
    const heads = this.lanes
      ? this.lanes.map((id) => ({ branch: id, step: this.branches.get(id)?.to_step ?? 0 }))
      : [this.head];
    for (const head of heads) parts.push(...this.#playhead(head, height));
    this.svg.replaceChildren(...parts);
    this.#reveal(this.branches.get(heads[0].branch)?.row ?? 0);
    this.#describe();
  }

  /** Scrolls a row into view when the playhead comes to it. */
  #reveal(row) {
    if (row === this.#row || this.#drag) return;
    this.#row = row;
    const y = this.#y(row) * this.#unit, room = this.element.clientHeight;
    this.element.scrollTop = y - room / 2;
  }

  *#ruler(height) {
    const total = this.#span * this.seconds;
    const room = Math.max(2, this.#width / 90);
    const every = TICKS.find((tick) => total / tick <= room) ?? TICKS.at(-1);
    for (let at = 0; at <= total; at += every) {
      const x = this.#x(at / this.seconds);
      yield node("path", { class: "grid", d: `M${x} ${TOP - 8}V${height - BOTTOM + 2}` });
      const label = node("text", { class: "ruler", x, y: height - 5 });
      label.textContent = clock(at, 0);
      yield label;
    }
  }

  #y(row) {
    return TOP + row * ROW + ROW / 2;
  }

  *#line(branch, live) {
    const y = this.#y(branch.row), to = this.#x(branch.to_step);
    const parent = this.branches.get(branch.parent);
    let d = `M${this.#x(0)} ${y}H${Math.max(to, this.#x(0) + 1)}`;
    if (parent) {
      const x = this.#x(branch.from_step), from = this.#y(parent.row);
      d = `M${x} ${from}V${y - 8}Q${x} ${y} ${x + 8} ${y}H${Math.max(to, x + 9)}`;
    }
    const colour = `c${branch.id % COLOURS}`;
    yield node("path", { class: `branch ${colour}${live ? " live" : ""}`, d });
    yield node("circle", { class: `tip ${colour}${live ? " live" : ""}`, cx: to, cy: y, r: 3.5 });
    yield* this.#ticks("snapshots", `${y + 5}v3`, this.branches.snapshots, branch);
    const keys = this.marks.filter((mark) => mark.kind === "key");
    yield* this.#ticks("keys-honoured", `${y - 5}v-4`, keys, branch);
    const prompts = this.marks.filter((mark) => mark.kind === "prompt");
    yield* this.#ticks("prompts", `${y - 7}l4 -4l-4 -4l-4 4z`, prompts, branch);
  }

  /** One path with a mark for each place on a branch: there may be thousands. */
  *#ticks(name, shape, places, branch) {
    const d = places.filter((place) => place.branch === branch.id)
      .map(({ step }) => `M${this.#x(step)} ${shape}`).join("");
    if (d) yield node("path", { class: name, d });
  }

  *#playhead({ branch, step }, height) {
    const row = this.branches.get(branch)?.row ?? 0, x = this.#x(step);
    yield node("path", { class: "head", d: `M${x} ${TOP - 8}V${height - BOTTOM + 2}` });
    yield node("circle", { class: "head", cx: x, cy: this.#y(row), r: 6 });
  }

  #describe() {
    const { branch, step } = this.head;
    const facts = this.branches.get(branch);
    const end = facts?.to_step ?? step;
    const place = this.branches.rows.length > 1
      ? `, branch ${(facts?.row ?? 0) + 1} of ${this.branches.rows.length}` : "";
    this.element.setAttribute("aria-valuemax", end);
    this.element.setAttribute("aria-valuenow", step);
    this.element.setAttribute("aria-valuetext",
      `${clock(step * this.seconds)} of ${clock(end * this.seconds)}${place}`);
  }

  /** The branch and step under a point: the nearest row, its own lineage before the fork. */
  #at(event) {
    const { rows } = this.branches;
    if (!rows.length) return null;
    const y = (event.clientY - this.svg.getBoundingClientRect().top) / this.#unit;
    const row = Math.round((y - TOP - ROW / 2) / ROW);
    const branch = rows[Math.min(rows.length - 1, Math.max(0, row))];
    return { branch: branch.id, step: clamp(this.#stepAt(event), branch.to_step) };
  }

  #followPointer() {
    const { element } = this;
    element.addEventListener("pointerdown", (event) => {
      if (this.#drag || event.button || !(this.#drag = this.#at(event))) return;
      element.setPointerCapture(event.pointerId);
      this.#unpeek();
      // A finger may only scroll the page: it scrubs once it moves here or lifts.
      this.#scrubbed = event.pointerType !== "touch";
      if (this.#scrubbed) this.onScrub(this.#drag.branch, this.#drag.step, false);
    });
    element.addEventListener("pointermove", (event) => {
      const at = this.#at(event);
      if (!at) return;
      if (!this.#drag) {
        this.#peek(event, at);
        return;
      }
      // A drag stays in its branch, however the hand wanders.
      const end = this.branches.get(this.#drag.branch)?.to_step ?? at.step;
      this.#drag.step = clamp(this.#stepAt(event), end);
      this.#scrubbed = true;
      this.onScrub(this.#drag.branch, this.#drag.step, false);
    });
    const end = () => {
      if (!this.#drag) return;
      const { branch, step } = this.#drag;
      this.#drag = null;
      this.onScrub(branch, step, true);
    };
    element.addEventListener("pointerup", end);
    element.addEventListener("pointercancel", () => {
      if (this.#scrubbed) end();
      this.#drag = null;
    });
    element.addEventListener("pointerleave", () => this.#unpeek());
  }

  async #peek(event, at) {
    if (event.pointerType === "touch") return;
    const ticket = (this.#hover += 1);
    const bitmap = await this.preview(at.branch, at.step);
    if (ticket !== this.#hover) {
      bitmap?.close();
      return;
    }
    this.thumb.hidden = !bitmap;
    if (!bitmap) return;
    Object.assign(this.thumb, { width: bitmap.width, height: bitmap.height });
    this.thumb.getContext("2d").drawImage(bitmap, 0, 0);
    bitmap.close();
    const half = this.thumb.offsetWidth / 2, x = this.#x(at.step) * this.#unit;
    this.thumb.style.left = `${Math.max(half, clamp(x, this.element.clientWidth - half))}px`;
  }

  #unpeek() {
    this.#hover += 1;
    this.thumb.hidden = true;
  }

  #key(event) {
    const { branch, step } = this.head;
    const second = Math.round(1 / this.seconds);
    const end = this.branches.get(branch)?.to_step ?? 0;
    const target = {
      ArrowLeft: step - 1,
      ArrowRight: step + 1,
      PageUp: step + second,
      PageDown: step - second,
      Home: 0,
      End: end,
    }[event.key];
    if (target !== undefined) {
      event.preventDefault();
      this.onScrub(branch, clamp(target, end), true);
    } else if (event.key === "ArrowUp" || event.key === "ArrowDown") {
      event.preventDefault();
      this.stepBranch(event.key === "ArrowUp" ? -1 : 1);
    }
  }
}

/** Seconds as m:ss.d. */
export function clock(seconds, digits = 1) {
  const tenths = Math.round(seconds * 10) / 10; // 59.96 is 1:00.0, not 0:60.0
  const minutes = Math.floor(tenths / 60);
  const rest = (tenths - 60 * minutes).toFixed(digits);
  return `${minutes}:${rest.padStart(digits ? 3 + digits : 2, "0")}`;
}

function clamp(step, end) {
  return Math.min(end, Math.max(0, step));
}

function node(name, attributes) {
  const element = document.createElementNS(SVG, name);
  for (const [key, value] of Object.entries(attributes)) element.setAttribute(key, value);
  return element;
}
