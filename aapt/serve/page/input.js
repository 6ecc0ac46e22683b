// Turns keys, a dragged stick and a gamepad into the two numbers of a control, per lane.

const BACK = -0.4; // walking back is slow
const KEYS = { // code -> [yaw, forward, label, lane in split screen]
  KeyW: [0, 1, "w", 0],
  KeyA: [-1, 0, "a", 0],
  KeyS: [0, BACK, "s", 0],
  KeyD: [1, 0, "d", 0],
  ArrowUp: [0, 1, "w", 1],
  ArrowLeft: [-1, 0, "a", 1],
  ArrowDown: [0, BACK, "s", 1],
  ArrowRight: [1, 0, "d", 1],
};
const STICK_RADIUS = 64; // pixels of travel for a full deflection
const STICK_DEAD = 0.12;
const PAD_DEAD = 0.16;
const ANALOG_MS = 33; // shortest time between two messages of a stick or a pad

const WRITTEN_IN = "input, textarea, select, dialog"; // elements in which letters mean letters

/**
 * Calls `onChange({lane, yaw, forward, taps, time, key})` on every change of a control, and
 * `onButton(index)` when a button of the gamepad goes down. With two lanes, W A S D and the gamepad
 * steer the first, the arrows the second, and a stick the one it starts on.
 *
 * `taps` is the deflection of a key that has just gone down, so that a press shorter than a step
 * still acts; `key` is its label. Losing the focus lets every key go.
 */
export class Input {
  #held = new Map(); // code of a key -> lane
  #stick = { lane: 0, yaw: 0, forward: 0 };
  #pad = { yaw: 0, forward: 0 };
  #padButtons = [];
  #sentAt = 0;
  #trailing = 0;
  lanes = 1;
  moves = true; // false for a model without a camera: only the buttons of a gamepad act

  constructor(surface, stick, { onChange, onButton }) {
    this.onChange = onChange;
    this.onButton = onButton;
    addEventListener("keydown", (event) => this.#down(event));
    addEventListener("keyup", (event) => this.#up(event));
    addEventListener("blur", () => this.release());
    document.addEventListener("visibilitychange", () => this.release());
    document.addEventListener("focusin", ({ target }) => {
      if (target.closest(WRITTEN_IN)) this.release();
    });
    this.#followPointer(surface, stick);
    addEventListener("gamepadconnected", () => requestAnimationFrame(() => this.#pollPad()));
  }

  /** Labels of the keys that are down for the first lane. */
  get heldKeys() {
    return [...this.#held].filter(([, lane]) => lane === 0).map(([code]) => KEYS[code][2]);
  }

  /** Lets everything go, and says so if anything was held. */
  release() {
    const lanes = new Set(this.#held.values());
    if (this.#stick.yaw || this.#stick.forward) lanes.add(this.#stick.lane);
    this.#held.clear();
    Object.assign(this.#stick, { yaw: 0, forward: 0 });
    for (const lane of lanes) this.#tell(lane);
  }

  #down(event) {
    if (!this.moves || !(event.code in KEYS) || event.ctrlKey || event.metaKey || event.altKey) return;
    if (event.target.closest?.(WRITTEN_IN)) return;
    if (event.code.startsWith("Arrow") && event.target.closest?.("[role=slider]")) return;
    event.preventDefault();
    if (this.#held.has(event.code)) return;
    const [yaw, forward, key, half] = KEYS[event.code];
    const lane = this.lanes > 1 ? half : 0;
    this.#held.set(event.code, lane);
    this.#tell(lane, { taps: { yaw, forward }, key, time: event.timeStamp });
  }

  #up(event) {
    const lane = this.#held.get(event.code);
    if (this.#held.delete(event.code)) this.#tell(lane, { time: event.timeStamp });
  }

  #control(lane) {
    let yaw = 0, forward = 0;
    const add = (deflection) => {
      yaw += deflection.yaw;
      forward += deflection.forward;
    };
    for (const [code, at] of this.#held) {
      if (at === lane) add({ yaw: KEYS[code][0], forward: KEYS[code][1] });
    }
    if (this.#stick.lane === lane) add(this.#stick);
    if (lane === 0) add(this.#pad);
    return { yaw: clamp(yaw, -1, 1), forward: clamp(forward, BACK, 1) };
  }

  #tell(lane, { taps = null, key = null, time = performance.now() } = {}) {
    this.onChange({ lane, ...this.#control(lane), taps, key, time });
  }

  #tellAnalog(lane, start = false) {
    clearTimeout(this.#trailing);
    const wait = this.#sentAt + ANALOG_MS - performance.now();
    if (wait > 0 && !start) {
      this.#trailing = setTimeout(() => this.#tellAnalog(lane), wait);
      return;
    }
    this.#sentAt = performance.now();
    this.#tell(lane, { key: start ? "stick" : null });
  }

  #followPointer(surface, stick) {
    let origin = null;
    const knob = stick.firstElementChild;
    surface.addEventListener("pointerdown", (event) => {
      if (origin || !this.moves || event.button || event.target.closest("button, a, .card")) return;
      surface.setPointerCapture(event.pointerId);
      surface.focus({ preventScroll: true });
      origin = { id: event.pointerId, x: event.clientX, y: event.clientY, moved: false };
      const box = surface.getBoundingClientRect();
      const second = this.lanes > 1 && event.target.closest(".lane:last-child");
      this.#stick.lane = second ? 1 : 0;
      stick.style.left = `${event.clientX - box.left}px`;
      stick.style.top = `${event.clientY - box.top}px`;
      knob.style.transform = "";
    });
    surface.addEventListener("pointermove", (event) => {
      if (origin?.id !== event.pointerId) return;
      const x = event.clientX - origin.x, y = event.clientY - origin.y;
      const length = Math.hypot(x, y) || 1;
      const size = Math.min(1, length / STICK_RADIUS);
      const live = size > STICK_DEAD ? size / length : 0;
      if (!live && !origin.moved) return;
      stick.hidden = false;
      knob.style.transform = `translate(${(x / length) * size * 32}px, ${(y / length) * size * 32}px)`;
      const up = -y * live;
      Object.assign(this.#stick, { yaw: x * live, forward: up > 0 ? up : up * -BACK });
      this.#tellAnalog(this.#stick.lane, !origin.moved);
      origin.moved = true;
    });
    const end = (event) => {
      if (origin?.id !== event.pointerId) return;
      const { moved } = origin;
      origin = null;
      stick.hidden = true;
      Object.assign(this.#stick, { yaw: 0, forward: 0 });
      clearTimeout(this.#trailing);
      if (moved) this.#tell(this.#stick.lane);
    };
    surface.addEventListener("pointerup", end);
    surface.addEventListener("pointercancel", end);
  }

  #pollPad() {
    const pad = navigator.getGamepads().find((entry) => entry);
    if (!pad) {
      this.#pad = { yaw: 0, forward: 0 };
      if (this.moves) this.#tell(0);
      return;
    }
    const axis = (value) => (Math.abs(value) < PAD_DEAD ? 0 : value);
    const yaw = clamp(axis(pad.axes[0]) + axis(pad.axes[2] ?? 0), -1, 1), up = -axis(pad.axes[1]);
    const forward = up > 0 ? up : up * -BACK;
    const still = !this.#pad.yaw && !this.#pad.forward;
    const change = Math.abs(yaw - this.#pad.yaw) + Math.abs(forward - this.#pad.forward);
    if (this.moves && change > 0.02) {
      this.#pad = { yaw, forward };
      this.#tellAnalog(0, still);
    }
    pad.buttons.forEach((button, index) => {
      if (button.pressed && !this.#padButtons[index]) this.onButton(index);
      this.#padButtons[index] = button.pressed;
    });
    requestAnimationFrame(() => this.#pollPad());
  }
}

function clamp(value, low, high) {
  return Math.min(high, Math.max(low, value));
}
