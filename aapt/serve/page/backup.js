// Fetches what another server needs to go on with a world: its action log and a snapshot.

const PAUSE_MS = 10_000; // between two fetches while the world is played
const LINE_MS = 20; // added for each line of the log

export class Backup {
  log = null; // lines of the action log
  saved = null; // a snapshot, a Blob
  #waiters = [];

  /** playing: says whether the world is played now. */
  constructor(connection, playing) {
    this.connection = connection;
    this.playing = playing;
    this.#repeat();
  }

  /** The action log as a file, null without one. */
  get walk() {
    return this.log && new Blob([`${this.log.join("\n")}\n`]);
  }

  fetch() {
    this.connection.send({ type: "log" });
    this.connection.send({ type: "save" });
  }

  /** Fetches the action log; resolves to its lines. */
  fetchLog() {
    this.connection.send({ type: "log" });
    return new Promise((resolve) => this.#waiters.push(resolve));
  }

  /** Takes the lines of a fetched log. */
  logged(lines) {
    this.log = lines;
    for (const resolve of this.#waiters.splice(0)) resolve(lines);
  }

  #repeat() {
    if (this.playing()) this.fetch();
    setTimeout(() => this.#repeat(), PAUSE_MS + LINE_MS * (this.log?.length ?? 0));
  }
}
