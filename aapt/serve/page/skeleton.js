// The figure over the video: joints to drag by pointer, touch or keyboard.

import { dragged, limbLengths } from "./kinematics.js";

const TELL_MS = 33; // shortest time between two messages of a drag
const REACH = 0.09; // image heights from a joint at which a pointer takes it
const NUDGE = 0.01, FAR_NUDGE = 0.05; // image heights, of an arrow key; with Shift
const ARROWS = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1] };
const UNITS = 100; // of the drawing, in an image height
const SVG = "http://www.w3.org/2000/svg";

/**
 * Draws the figure of a lane into an <svg>. The joints show the pose to hold while there is one, and
 * behind them a thin figure shows the pose of the frame. With a motion the joints follow the frames.
 *
 * Calls `onPose({points, time, key})` when a joint is moved; `key` is its name at the first message of
 * a drag, else null.
 */
export class Skeleton {
  #points = null; // of the joints
  #frame = null; // of the frame painted last
  #grab = null; // {id, index, start, offset, told} of a drag
  #lengths = null;
  #timer = 0;
  #toldAt = 0;
  #joints = [];
  #limbs = [];
  #thin = [];
  holds = true; // the joints show a pose to hold

  constructor(svg, onPose) {
    this.svg = svg;
    this.onPose = onPose;
    svg.addEventListener("pointerdown", (event) => this.#take(event));
    svg.addEventListener("pointermove", (event) => this.#drag(event));
    for (const end of ["pointerup", "pointercancel"]) {
      svg.addEventListener(end, (event) => this.#drop(event));
    }
  }

  /** Takes names, limbs and colours of the figure (`welcome.figure`), and the image's aspect. */
  configure({ points: names, limbs, colours }, aspect) {
    this.aspect = aspect;
    this.names = names;
    this.limbs = limbs;
    this.#points = this.#frame = this.#lengths = this.#grab = null;
    clearTimeout(this.#timer);
    this.svg.setAttribute("viewBox", `0 0 ${UNITS * aspect} ${UNITS}`);
    this.#thin = limbs.map(() => make("line", "thin"));
    const edges = limbs.map(() => make("line", "edge"));
    const strokes = limbs.map((_, index) => {
      const line = make("line", "limb");
      line.style.stroke = colours[index];
      return line;
    });
    this.#limbs = limbs.map((_, index) => [edges[index], strokes[index]]);
    this.#joints = names.map((name, index) => this.#makeJoint(name, index));
    this.svg.replaceChildren(...this.#thin, ...edges, ...strokes, ...this.#joints);
  }

  /** Shows the pose of a painted frame. */
  show(points) {
    if (!points) return;
    this.#frame = points;
    if (!this.#lengths || !this.holds) this.#learn(points);
    if (this.#points && this.holds) this.#drawThin();
    else this.#moveTo(points);
  }

  /** Takes the lane's control: {points} to hold, or a {motion}. */
  control({ points, motion }) {
    this.holds = !motion;
    if (points && !this.#grab) this.#moveTo(points);
    this.#drawThin();
  }

  #makeJoint(name, index) {
    const joint = make("g", "joint");
    const about = {
      tabindex: 0, role: "slider", "aria-label": name, "aria-roledescription": "joint",
      "aria-valuemin": 0, "aria-valuemax": 100,
    };
    for (const [key, value] of Object.entries(about)) joint.setAttribute(key, value);
    const ring = make("circle", "ring"), dot = make("circle", "dot");
    ring.setAttribute("r", 3.4);
    dot.setAttribute("r", index === 0 ? 2.6 : 1.7);
    joint.append(ring, dot);
    joint.addEventListener("keydown", (event) => this.#nudge(event, index));
    return joint;
  }

  #take(event) {
    if (event.button || this.#grab || !this.#points) return;
    const place = this.#placeOf(event), index = this.#nearest(place);
    if (index === null) return;
    event.preventDefault(); // of a focus elsewhere, and of a selection
    this.svg.setPointerCapture(event.pointerId);
    this.#joints[index].focus({ preventScroll: true });
    const [x, y] = this.#points[index];
    const offset = [x - place[0], y - place[1]];
    this.#grab = { id: event.pointerId, index, start: this.#points, offset, told: false };
    this.#joints[index].classList.add("held");
  }

  #drag(event) {
    const grab = this.#grab;
    if (!grab) this.#hover(event);
    if (grab?.id !== event.pointerId) return;
    const place = this.#placeOf(event).map((value, axis) => value + grab.offset[axis]);
    this.#moveTo(dragged(grab.start, grab.index, place, this.aspect, this.#lengths));
    this.holds = true;
    this.#drawThin();
    this.#tell(event.timeStamp);
  }

  #drop(event) {
    if (this.#grab?.id !== event.pointerId) return;
    const { index, told } = this.#grab;
    this.#grab = null;
    this.#joints[index].classList.remove("held");
    clearTimeout(this.#timer);
    if (told) this.onPose({ points: this.#points, time: event.timeStamp, key: null });
  }

  /** Tells the pose of a drag, at once or when the next message may go out. */
  #tell(time) {
    clearTimeout(this.#timer);
    const wait = this.#toldAt + TELL_MS - performance.now();
    if (wait > 0 && this.#grab.told) {
      this.#timer = setTimeout(() => this.#tell(time), wait);
      return;
    }
    const key = this.#grab.told ? null : this.names[this.#grab.index];
    this.#grab.told = true;
    this.#toldAt = performance.now();
    this.onPose({ points: this.#points, time, key });
  }

  #nudge(event, index) {
    const arrow = ARROWS[event.key];
    if (!arrow || event.ctrlKey || event.metaKey || event.altKey || this.#grab) return;
    event.preventDefault();
    const [x, y] = this.#points[index], far = event.shiftKey ? FAR_NUDGE : NUDGE;
    const place = [x + (far * arrow[0]) / this.aspect, y + far * arrow[1]];
    this.holds = true;
    this.#moveTo(dragged(this.#points, index, place, this.aspect, this.#lengths));
    this.#drawThin();
    const key = event.repeat ? null : this.names[index];
    this.onPose({ points: this.#points, time: event.timeStamp, key });
  }

  /** Shows by the cursor that a joint can be taken here. */
  #hover(event) {
    const index = this.#points && this.#nearest(this.#placeOf(event));
    this.svg.classList.toggle("near", index !== null);
    this.#joints.forEach((joint, at) => joint.classList.toggle("near", at === index));
  }

  #placeOf({ clientX, clientY }) {
    const box = this.svg.getBoundingClientRect();
    return [(clientX - box.left) / box.width, (clientY - box.top) / box.height];
  }

  /** The joint nearest to a place, null if none is within reach. */
  #nearest([x, y]) {
    const away = this.#points.map(
      (point) => (point ? Math.hypot((point[0] - x) * this.aspect, point[1] - y) : Infinity));
    const least = Math.min(...away);
    return least <= REACH ? away.indexOf(least) : null;
  }

  /** Takes the lengths of limbs from a pose, which may shorten a limb that points at the camera. */
  #learn(points) {
    const known = this.#lengths;
    this.#lengths = limbLengths(points, this.aspect).map(
      (length, index) => Math.max(length ?? 0, known?.[index] ?? 0));
  }

  #moveTo(points) {
    this.#points = points;
    this.limbs.forEach((limb, index) => {
      for (const line of this.#limbs[index]) this.#place(line, points, limb);
    });
    points.forEach((point, index) => {
      const joint = this.#joints[index];
      joint.toggleAttribute("hidden", !point);
      if (!point) return;
      const [x, y] = this.#drawn(point);
      joint.setAttribute("transform", `translate(${x} ${y})`);
      // A motion would have a screen reader speak without end.
      if (this.holds) this.#describe(joint, point);
    });
  }

  #describe(joint, point) {
    const [left, top] = point.map((value) => Math.round(100 * value));
    joint.setAttribute("aria-valuenow", left);
    joint.setAttribute("aria-valuetext", `${left} % from the left, ${top} % from the top`);
  }

  #drawThin() {
    const shown = this.holds && this.#frame;
    this.limbs.forEach((limb, index) => {
      const line = this.#thin[index];
      if (shown) this.#place(line, this.#frame, limb);
      else line.setAttribute("visibility", "hidden");
    });
  }

  #place(line, points, [from, to]) {
    const seen = points[from] && points[to];
    line.setAttribute("visibility", seen ? "visible" : "hidden");
    if (!seen) return;
    const [x1, y1] = this.#drawn(points[from]), [x2, y2] = this.#drawn(points[to]);
    for (const [name, value] of Object.entries({ x1, y1, x2, y2 })) line.setAttribute(name, value);
  }

  #drawn([x, y]) {
    return [UNITS * this.aspect * x, UNITS * y];
  }
}

function make(name, className) {
  const element = document.createElementNS(SVG, name);
  element.setAttribute("class", className);
  return element;
}
