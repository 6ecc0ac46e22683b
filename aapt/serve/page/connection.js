// A WebSocket that says hello, comes back after a loss, and resumes its stream by the token.

import { FRAMES, PROTOCOL, parseFrames } from "./protocol.js";
import { read, write } from "./storage.js";

const RETRY_MS = [500, 1000, 2000, 4000, 8000];

/**
 * Dispatches "message" (detail: a parsed text message), "frames" and "file" (detail: a parsed binary
 * message) and "lost" (detail: {retryAt}).
 */
export class Connection extends EventTarget {
  #socket = null;
  #attempt = 0;
  #timer = 0;
  #refused = false;
  #token = read("sessionStorage", "token");

  #uploads = []; // {resolve, reject} of each upload under way; answers come in their order
  #uploadBytes = Infinity;

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

  /** Sends a file; resolves to its id. Rejects with the server's words. */
  async upload(file) {
    if (file.size > this.#uploadBytes) {
      throw new Error(`upload: expected at most ${this.#uploadBytes} bytes, got ${file.size}`);
    }
    const bytes = await file.arrayBuffer();
    if (!this.open) throw new Error("upload: expected a connection, got none; try again");
    this.#socket.send(bytes);
    return new Promise((resolve, reject) => this.#uploads.push({ resolve, reject }));
  }

  /** Stops for good: after an error that another attempt would only repeat. */
  refuse() {
    this.#refused = true;
    clearTimeout(this.#timer);
  }

  #receive(data) {
    if (data instanceof ArrayBuffer) {
      try {
        const message = parseFrames(data);
        this.#emit(message.kind === FRAMES ? "frames" : "file", message);
      } catch (error) {
        this.#emit("message", { type: "error", code: "frames", message: error.message, fatal: true });
      }
      return;
    }
    const message = JSON.parse(data);
    if (message.type === "welcome") {
      this.#attempt = 0;
      this.token = message.token;
      this.#uploadBytes = message.limits.upload_bytes;
    }
    if (message.type === "uploaded") {
      const { resolve, reject } = this.#uploads.shift();
      if (message.error) reject(new Error(message.error));
      else resolve(message.id);
      return;
    }
    this.#emit("message", message);
  }

  #lose() {
    for (const { reject } of this.#uploads.splice(0)) {
      reject(new Error("upload: expected an answer, but the connection was lost; try again"));
    }
    if (this.#refused) return;
    const delay = RETRY_MS[Math.min(this.#attempt, RETRY_MS.length - 1)];
    this.#attempt += 1;
    this.#timer = setTimeout(() => this.connect(), delay);
    this.#emit("lost", { retryAt: performance.now() + delay });
  }

  #emit(name, detail) {
    this.dispatchEvent(new CustomEvent(name, { detail }));
  }
}
