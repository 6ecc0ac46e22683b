// The controls that drive a model, and what a half of a split screen can hold of them.

const TURN = 0.6, AHEAD = 0.7;

/** Deflections of a camera; also of a model that its prompt alone drives. */
export class CameraControls {
  posed = false;
  own = ["W A S D", "arrow keys"]; // names of what the visitor holds in each lane
  lanes = [ // names and controls; null for what the visitor holds
    ["keys", null],
    ["ahead", { yaw: 0, forward: 1 }],
    ["ahead and left", { yaw: -TURN, forward: AHEAD }],
    ["ahead and right", { yaw: TURN, forward: AHEAD }],
    ["turn left", { yaw: -TURN, forward: 0 }],
    ["turn right", { yaw: TURN, forward: 0 }],
    ["stand still", { yaw: 0, forward: 0 }],
  ];

  /** The index in `lanes` of a control that has just been given: the visitor's own. */
  indexOf() {
    return 0;
  }

  /** Indices of the controls of a new split: the present one, and another. */
  split() {
    return [0, 3];
  }

  message(control, taps) {
    return { type: "input", ...control, taps };
  }
}

/** The pose of a figure: {points} to hold, or a {motion} that loops. */
export class PoseControls {
  posed = true;
  own = ["your pose", "your pose"];

  /** motions: names, as in `welcome.figure`. */
  constructor(motions) {
    this.lanes = [["pose", null], ...motions.map((motion) => [motion, { motion }])];
  }

  indexOf({ motion }) {
    return motion ? this.lanes.findIndex(([name]) => name === motion) : 0;
  }

  split(present) {
    const other = present.motion === "dance" ? "wave" : "dance";
    return [this.indexOf(present), this.indexOf({ motion: other })];
  }

  message(control) {
    return { type: "pose", ...control };
  }
}

/** The controls of a server's model, by its "welcome". */
export function controlsOf({ driven_by: drivenBy, figure }) {
  return drivenBy === "pose" ? new PoseControls(figure.motions) : new CameraControls();
}
