// The tree of branches: who comes from whom, in which row each is drawn, and where one can go.

/** Branches {id, parent, from_step, to_step, prompt} of the last "tree", with rows. */
export class Branches {
  #byId = new Map();
  rows = []; // branches in the order they are drawn, parents before children
  snapshots = [];
  replayMs = 0;

  /** Takes a "tree" message. */
  update({ branches, snapshots, replay_ms: replayMs }) {
    this.#byId = new Map(branches.map((branch) => [branch.id, { ...branch }]));
    this.snapshots = snapshots;
    this.replayMs = replayMs;
    this.rows = [];
    for (const branch of this.#byId.values()) {
      if (branch.parent === null || !this.#byId.has(branch.parent)) this.#place(branch);
    }
  }

  clear() {
    this.#byId.clear();
    this.rows = [];
    this.snapshots = [];
  }

  /** Notes that a branch has reached a step, before the next "tree" says so. */
  advance(id, step) {
    const branch = this.#byId.get(id);
    if (branch && step > branch.to_step) branch.to_step = step;
  }

  get(id) {
    return this.#byId.get(id);
  }

  get lastStep() {
    return Math.max(0, ...this.rows.map((branch) => branch.to_step));
  }

  /** The branch itself, its parent, and so on to the root. */
  lineage(id) {
    const line = [];
    for (let at = this.#byId.get(id); at; at = this.#byId.get(at.parent)) line.push(at);
    return line;
  }

  /** The branch of a lineage that holds a step: an ancestor for the steps before the fork. */
  owner(id, step) {
    const line = this.lineage(id);
    return (line.find((branch) => step > branch.from_step) ?? line.at(-1))?.id ?? id;
  }

  /** Steps that a jump replays: from the nearest snapshot before it in the lineage. */
  replayed(id, step) {
    let nearest = 0;
    for (const branch of this.lineage(id)) {
      const limit = Math.min(step, branch.id === id ? step : this.#end(id, branch.id));
      for (const snapshot of this.snapshots) {
        if (snapshot.branch === branch.id && snapshot.step <= limit) {
          nearest = Math.max(nearest, snapshot.step);
        }
      }
    }
    return step - nearest;
  }

  /** The last step of `ancestor` that belongs to the lineage of `id`. */
  #end(id, ancestor) {
    const line = this.lineage(id);
    const below = line[line.findIndex((branch) => branch.id === ancestor) - 1];
    return below.from_step;
  }

  #place(branch) {
    branch.row = this.rows.length;
    this.rows.push(branch);
    const children = [...this.#byId.values()].filter((other) => other.parent === branch.id);
    // The latest fork is drawn next to its parent, so that no line crosses another.
    for (const child of children.sort((a, b) => b.from_step - a.from_step || a.id - b.id)) {
      this.#place(child);
    }
  }
}
