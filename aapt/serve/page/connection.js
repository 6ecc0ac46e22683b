// A WebSocket that says hello, comes back after a loss, and resumes its stream by the token.

import { PROTOCOL, parseFrames } from "./protocol.js";
import { read, write } from "./storage.js";

const RETRY_MS = [500, 1000, 2000, 4000, 8000];

/**
 * Dispatches "message" (detail: a parsed text message), "frames" (detail: parsed frames),
 * "lost" (detail: {retryAt, attempt}) and "up".
 */
export class Connection extends EventTarget {
  #socket = null;
  #attempt = 0;
  #timer = 0;
  #refused = false;
  #token = read("sessionStorage", "token");

  constructor(url, formats) {
    super();
    this.url = url;
    this.formats = formats;
  }

  /** Names the stream for a minute after a loss; a tab that is loaded again still has it. */
  get token() {
    return this.#token;
  }

  set token(token) {
    this.#token = token;
    write("sessionStorage", "token", token);
  }

  get open() {
    return this.#socket?.readyState === WebSocket.OPEN;
  }

  connect() {
    clearTimeout(this.#timer);
    this.#socket?.close();
    this.#refused = false;
    const socket = new WebSocket(this.url);
    socket.binaryType = "arraybuffer";
    this.#socket = socket;
    socket.onopen = () => {
      this.send({ type: "hello", protocol: PROTOCOL, resume: this.token, formats: this.formats });
      this.#emit("up");
    };
    socket.onmessage = ({ data }) => {
      if (socket === this.#socket) this.#receive(data);
    };
    socket.onclose = () => {
      if (socket === this.#socket) this.#lose();
    };
  }

  send(message) {
    if (this.open) this.#socket.send(JSON.stringify(message));
  }

  /** Stops for good: after an error that another attempt would only repeat. */
  refuse() {
    this.#refused = true;
    clearTimeout(this.#timer);
  }

  #receive(data) {
    if (data instanceof ArrayBuffer) {
      try {
        this.#emit("frames", parseFrames(data));
      } catch (error) {
        this.#emit("message", { type: "error", code: "frames", message: error.message, fatal: true });
      }
      return;
    }
    const message = JSON.parse(data);
    if (message.type === "welcome") {
      this.#attempt = 0;
      this.token = message.token;
    }
    this.#emit("message", message);
  }

  #lose() {
    if (this.#refused) return;
    const delay = RETRY_MS[Math.min(this.#attempt, RETRY_MS.length - 1)];
    this.#attempt += 1;
    this.#timer = setTimeout(() => this.connect(), delay);
    this.#emit("lost", { retryAt: performance.now() + delay, attempt: this.#attempt });
  }

  #emit(name, detail) {
    this.dispatchEvent(new CustomEvent(name, { detail }));
  }
}
