// Turns keys, a dragged stick and a gamepad into the two numbers of a control.

const BACK = -0.4; // walking back is slow
const KEYS = { // code -> [yaw, forward, label]
  KeyW: [0, 1, "w"],
  KeyA: [-1, 0, "a"],
  KeyS: [0, BACK, "s"],
  KeyD: [1, 0, "d"],
  ArrowUp: [0, 1, "w"],
  ArrowLeft: [-1, 0, "a"],
  ArrowDown: [0, BACK, "s"],
  ArrowRight: [1, 0, "d"],
};
const STICK_RADIUS = 64; // pixels of travel for a full deflection
const STICK_DEAD = 0.12;
const PAD_DEAD = 0.16;
const ANALOG_MS = 33; // shortest time between two messages of a stick or a pad

const WRITTEN_IN = "input, textarea, select, dialog"; // elements in which letters mean letters

/**
 * Calls `onChange({yaw, forward, taps, time, key})` on every change of the control, and
 * `onButton(index)` when a button of the gamepad goes down.
 *
 * `taps` is the deflection of a key that has just gone down, so that a press shorter than a step
 * still acts; `key` is its label. Losing the focus lets every key go.
 */
export class Input {
  #held = new Set(); // codes of keys
  #stick = { yaw: 0, forward: 0 };
  #pad = { yaw: 0, forward: 0 };
  #padButtons = [];
  #sentAt = 0;
  #trailing = 0;

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

  /** Labels of the keys that are down. */
  get heldKeys() {
    return [...this.#held].map((code) => KEYS[code][2]);
  }

  /** Lets everything go, and says so if anything was held. */
  release() {
    if (!this.#held.size && !this.#stick.yaw && !this.#stick.forward) return;
    this.#held.clear();
    this.#stick = { yaw: 0, forward: 0 };
    this.#tell();
  }

  #down(event) {
    if (!(event.code in KEYS) || event.ctrlKey || event.metaKey || event.altKey) return;
    if (event.target.closest?.(WRITTEN_IN)) return;
    if (event.code.startsWith("Arrow") && event.target.closest?.("[role=slider]")) return;
    event.preventDefault();
    if (this.#held.has(event.code)) return;
    const [yaw, forward, key] = KEYS[event.code];
    this.#held.add(event.code);
    this.#tell({ taps: { yaw, forward }, key, time: event.timeStamp });
  }

  #up(event) {
    if (this.#held.delete(event.code)) this.#tell({ time: event.timeStamp });
  }

  get #control() {
    let yaw = this.#stick.yaw + this.#pad.yaw, forward = this.#stick.forward + this.#pad.forward;
    for (const code of this.#held) {
      yaw += KEYS[code][0];
      forward += KEYS[code][1];
    }
    return { yaw: clamp(yaw, -1, 1), forward: clamp(forward, BACK, 1) };
  }

  #tell({ taps = null, key = null, time = performance.now() } = {}) {
    this.onChange({ ...this.#control, taps, key, time });
  }

  #tellAnalog(start = false) {
    clearTimeout(this.#trailing);
    const wait = this.#sentAt + ANALOG_MS - performance.now();
    if (wait > 0 && !start) {
      this.#trailing = setTimeout(() => this.#tellAnalog(), wait);
      return;
    }
    this.#sentAt = performance.now();
    this.#tell({ key: start ? "stick" : null });
  }

  #followPointer(surface, stick) {
    let origin = null;
    const knob = stick.firstElementChild;
    surface.addEventListener("pointerdown", (event) => {
      if (event.button || event.target.closest("button, a, .card")) return;
      surface.setPointerCapture(event.pointerId);
      surface.focus({ preventScroll: true });
      origin = { id: event.pointerId, x: event.clientX, y: event.clientY, moved: false };
      const box = surface.getBoundingClientRect();
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
      this.#stick = { yaw: x * live, forward: up > 0 ? up : up * -BACK };
      this.#tellAnalog(!origin.moved);
      origin.moved = true;
    });
    const end = (event) => {
      if (origin?.id !== event.pointerId) return;
      const { moved } = origin;
      origin = null;
      stick.hidden = true;
      this.#stick = { yaw: 0, forward: 0 };
      clearTimeout(this.#trailing);
      if (moved) this.#tell();
    };
    surface.addEventListener("pointerup", end);
    surface.addEventListener("pointercancel", end);
  }

  #pollPad() {
    const pad = navigator.getGamepads().find((entry) => entry);
    if (!pad) {
      this.#pad = { yaw: 0, forward: 0 };
      this.#tell();
      return;
    }
    const axis = (value) => (Math.abs(value) < PAD_DEAD ? 0 : value);
    const yaw = clamp(axis(pad.axes[0]) + axis(pad.axes[2] ?? 0), -1, 1), up = -axis(pad.axes[1]);
    const forward = up > 0 ? up : up * -BACK;
    const still = !this.#pad.yaw && !this.#pad.forward;
    if (Math.abs(yaw - this.#pad.yaw) + Math.abs(forward - this.#pad.forward) > 0.02) {
      this.#pad = { yaw, forward };
      this.#tellAnalog(still);
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
