// Shows the frames of a pass evenly: they arrive together, once per step.

const SMOOTHING = 0.1; // weight of the newest gap between passes in the running mean
const EARLY = 0.75; // shortest time between two passes in periods, as in session.py
const STALL_PERIODS = 2; // a backlog beyond this many periods is dropped

/**
 * Spaces frames by an exponential moving average of the gaps between passes.
 *
 * A late pass delays what follows; the delay then absorbs the next late pass, and drains while
 * none comes. All times are milliseconds of `performance.now()`.
 */
export class Pacer {
  #queue = []; // {frame, due}
  #free = 0; // when the last queued frame has had its time
  #arrived = null;
  #gained = 0; // milliseconds by which the newest pass came early for a key

  /** period: expected milliseconds between passes of `count` frames. */
  constructor(period, count) {
    this.nominal = period;
    this.period = period;
    this.count = count;
  }

  /** Milliseconds that the queued frames will last. */
  backlog(now) {
    return Math.max(0, this.#free - now);
  }

  /**
   * Queues the frames of a pass; with `urgent`, in place of all that is queued. A pass that came early
   * for a key lasts longer by the time that it gained, because the next pass is not early. Early
   * passes in a row gain time once, as in session.py.
   */
  push(frames, now, urgent = false) {
    const gap = this.#arrived === null ? Infinity : now - this.#arrived;
    if (gap < 3 * this.nominal) this.period += SMOOTHING * (gap - this.period);
    this.#arrived = now;
    if (urgent || this.backlog(now) > STALL_PERIODS * this.period) {
      this.#drop();
      this.#free = now;
    }
    const start = Math.max(now, this.#free);
    const most = (1 - EARLY) * this.period;
    const gained = Math.max(0, this.#gained + this.period - gap);
    this.#gained = urgent ? Math.min(most, gained) : 0;
    const hurry = urgent ? 0 : Math.min(most, 0.5 * (start - now));
    const time = this.period + this.#gained - hurry;
    const spacing = time / this.count;
    frames.forEach((frame, index) => this.#queue.push({ frame, due: start + index * spacing }));
    this.#free = start + frames.length * spacing;
  }

  /**
   * Shows what is queued faster, because the next pass is early for a key: as early as passes may
   * be, and at the soonest after `lead` milliseconds.
   */
  hasten(now, lead) {
    const end = Math.max(this.#arrived + this.#gained + EARLY * this.period, now + lead);
    if (!this.#queue.length || end >= this.#free) return;
    const share = (end - now) / (this.#free - now);
    for (const slot of this.#queue) slot.due = now + share * (slot.due - now);
    this.#free = end;
  }

  /** Puts remade frames in the places of those of their step that are still queued. */
  replace(frames) {
    const remade = new Map(frames.map((frame) => [`${frame.step}:${frame.index}`, frame]));
    for (const slot of this.#queue) {
      const key = `${slot.frame.step}:${slot.frame.index}`;
      const frame = remade.get(key);
      if (!frame) continue;
      close([slot.frame]);
      slot.frame = frame;
      remade.delete(key);
    }
    close([...remade.values()]); // their places are shown already
  }

  /** The newest frame that is due, null if none is. Frames it overtakes are never shown. */
  take(now) {
    let frame = null;
    while (this.#queue.length && this.#queue[0].due <= now) {
      if (frame) close([frame]);
      frame = this.#queue.shift().frame;
    }
    return frame;
  }

  clear() {
    this.#drop();
    this.#free = 0;
    this.#arrived = null;
    this.#gained = 0;
    this.period = this.nominal;
  }

  #drop() {
    close(this.#queue.splice(0).map(({ frame }) => frame));
  }
}

/** Frees the images of frames that are not shown. */
export function close(frames) {
  for (const { bitmap } of frames) bitmap?.close();
}
