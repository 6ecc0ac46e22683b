// How a dragged joint moves the other joints of a figure: pure functions of its points.
//
// A pose is 14 points in the order of `welcome.figure.points`: [x, y], shares of the image's width and
// height, or null for a hidden point. `aspect` is the image's width over its height; lengths are in
// image heights.

const HIPS = [8, 11];
const ROOT = -1; // the middle of the hips
// The point about which each point turns, as in figure.py.
const PARENTS = [1, ROOT, 1, 2, 3, 1, 5, 6, ROOT, 8, 9, ROOT, 11, 12];
// Wrists and ankles: the ends of two limbs that begin at `from` and bend at `middle`; straight ones
// bend to the `side`.
const ENDS = {
  4: { from: 2, middle: 3, side: 1 },
  7: { from: 5, middle: 6, side: -1 },
  10: { from: 8, middle: 9, side: 1 },
  13: { from: 11, middle: 12, side: -1 },
};
const STRAIGHT = 0.02; // sine of the angle between two limbs that have no side yet
const HALVINGS = 12; // of the way to a place that the figure cannot reach inside the image

/** The distance of each point from the point about which it turns, null without one. */
export function limbLengths(points, aspect) {
  const at = scaled(points, aspect);
  return at.map((point, index) => {
    const parent = placeOf(at, PARENTS[index]);
    return point && parent && Math.hypot(...minus(point, parent));
  });
}

/**
 * The pose after joint `index` of a pose is dragged towards a place [x, y]. No limb changes its length.
 *
 * A hip moves the whole figure. A wrist or an ankle bends its two limbs, which then have the `lengths`
 * of `limbLengths`. Any other joint turns, with all that hangs by it. If a point would leave the image,
 * the joint goes as far on its way as all of them stay inside. Points that begin outside the image may
 * stay there, but go no further out.
 */
export function dragged(points, index, place, aspect, lengths) {
  const at = scaled(points, aspect), from = at[index], to = [place[0] * aspect, place[1]];
  const attempt = (share) => unscaled(
    moved(at, index, plus(from, times(share, minus(to, from))), lengths), aspect);
  const whole = attempt(1);
  if (inside(whole, points)) return whole;
  let reached = 0;
  for (let half = 0.5, n = 0; n < HALVINGS; n += 1, half /= 2) {
    if (inside(attempt(reached + half), points)) reached += half;
  }
  return attempt(reached).map((point, at) => (
    point && point.map((value, axis) => clamp(value, ...limits(points[at][axis])))));
}

function moved(at, index, to, lengths) {
  if (HIPS.includes(index)) {
    const away = minus(to, at[index]);
    return at.map((point) => point && plus(point, away));
  }
  const end = ENDS[index], parent = placeOf(at, PARENTS[index]);
  const result = [...at];
  if (end && at[end.from] && at[end.middle]) {
    [result[end.middle], result[index]] = bent(
      at[end.from], at[end.middle], at[index], to, lengths[end.middle], lengths[index], end.side);
  } else if (parent) {
    const turn = angle(minus(to, parent)) - angle(minus(at[index], parent));
    at.forEach((point, other) => {
      if (point && hangsBy(other, index)) {
        result[other] = plus(parent, turned(minus(point, parent), turn));
      }
    });
  } else {
    result[index] = to;
  }
  return result;
}

/** Middle and end of two limbs that reach for a place, bent to the side to which they are bent now. */
function bent(from, middle, end, to, upper, lower, side) {
  const way = minus(to, from), now = minus(end, from), knee = minus(middle, from);
  const cross = (now[0] * knee[1] - now[1] * knee[0]) / (Math.hypot(...now) * upper || 1);
  const direction = Math.hypot(...way) > 1e-6 ? angle(way) : angle(now);
  const least = Math.abs(upper - lower) + 1e-6;
  const distance = clamp(Math.hypot(...way), least, upper + lower);
  const cosine = (upper ** 2 + distance ** 2 - lower ** 2) / (2 * upper * distance || 1);
  const inner = Math.acos(clamp(cosine, -1, 1));
  const sign = Math.abs(cross) > STRAIGHT ? Math.sign(cross) : side;
  const at = plus(from, polar(upper, direction + sign * inner));
  return [at, plus(from, polar(distance, direction))];
}

/** True for a joint and all that hangs by it. */
function hangsBy(other, index) {
  for (let at = other; at !== ROOT; at = PARENTS[at]) if (at === index) return true;
  return false;
}

function placeOf(at, index) {
  if (index !== ROOT) return at[index];
  const [right, left] = HIPS.map((hip) => at[hip]);
  return right && left && times(0.5, plus(right, left));
}

const scaled = (points, aspect) => points.map((point) => point && [point[0] * aspect, point[1]]);
const unscaled = (at, aspect) => at.map((point) => point && [point[0] / aspect, point[1]]);
const limits = (start) => [Math.min(0, start), Math.max(1, start)];
const inside = (points, starts) => points.every((point, at) => !point || point.every((value, axis) => (
  value === clamp(value, ...limits(starts[at][axis])))));
const plus = (a, b) => [a[0] + b[0], a[1] + b[1]];
const minus = (a, b) => [a[0] - b[0], a[1] - b[1]];
const times = (share, a) => [share * a[0], share * a[1]];
const angle = ([x, y]) => Math.atan2(y, x);
const polar = (length, turn) => [length * Math.cos(turn), length * Math.sin(turn)];
const turned = ([x, y], turn) => [
  x * Math.cos(turn) - y * Math.sin(turn), x * Math.sin(turn) + y * Math.cos(turn)];
const clamp = (value, low, high) => Math.min(high, Math.max(low, value));
