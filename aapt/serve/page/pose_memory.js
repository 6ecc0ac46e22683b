// The poses of the steps received last.

const KEPT = 600; // steps, a hundred seconds

/** Poses of the video frames of each step, as "posed" tells them. */
export class PoseMemory {
  #kept = new Map();
  newest = { branch: 0, step: 0 }; // the step told last

  put({ branch, step, poses }) {
    this.newest = { branch, step };
    const key = `${branch}:${step}`;
    this.#kept.delete(key); // so that it is the newest
    this.#kept.set(key, poses);
    if (this.#kept.size > KEPT) this.#kept.delete(this.#kept.keys().next().value);
  }

  /** The poses of a step's frames, null if they are not kept. */
  get(branch, step) {
    return this.#kept.get(`${branch}:${step}`) ?? null;
  }

  clear() {
    this.#kept.clear();
  }
}
