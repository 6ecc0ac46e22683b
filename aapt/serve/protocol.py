"""Protocol 1 between the server and a page or program that plays: messages, and the frame header.

Text messages are JSON objects with a `type`. A binary message of the client is an upload: an image,
an action log or a saved world. A binary message of the server has a header of 64 bytes, `count`
lengths (u32), then the encoded video frames or one file. All numbers are little endian. All that a
visitor does goes over one connection, so that any replica can take it. `GET /schema` returns
`schema()`; docs/play.md explains the protocol with a client.
"""

import struct
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from pydantic import (
    BaseModel,
    ConfigDict,
    Discriminator,
    Field,
    Tag,
    TypeAdapter,
    ValidationError,
    model_validator,
)

from ..model.pose import FAR, POINTS
from ..streaming.poses import PRESETS

PROTOCOL = 1
FORMATS = ("jpeg", "webp", "h264")  # the index of a format is its number in the header
FRAMES, RECORDING, SAVED = 0, 1, 2  # kinds of binary messages
FIRST, REDO, SEEK = 1, 2, 4  # flags of the header
MAX_NAME = 255  # characters of a gallery name, which is a file's

Deflection = Annotated[float, Field(ge=-1, le=1, allow_inf_nan=False)]
Sequence = Annotated[int, Field(ge=0, lt=2**32)]
Milliseconds = Annotated[float, Field(allow_inf_nan=False)]
Seed = Annotated[int, Field(ge=0, lt=2**53, description="exact as a number of JavaScript")]
Prompt = Annotated[str, Field(max_length=1000)]
Share = Annotated[float, Field(ge=-FAR, le=1 + FAR, allow_inf_nan=False)]
Point = Annotated[
    tuple[Share, Share] | None,
    Field(
        description="shares of the image's width and height from the top left; outside the image "
        "below 0 or above 1; null if hidden"
    ),
]
Points = Annotated[list[Point], Field(min_length=len(POINTS), max_length=len(POINTS))]


class Message(BaseModel):
    """A JSON object with the fields named here and no others."""

    model_config = ConfigDict(extra="forbid")


class Deflections(Message):
    """The camera's controls: yaw > 0 turns right, forward > 0 walks ahead."""

    yaw: Deflection = 0.0
    forward: Deflection = 0.0


class Figure(Message):
    """The control of a figure: points to take and hold, or a motion of `welcome` to loop."""

    points: Points | None = None
    motion: Literal[PRESETS] | None = None

    @model_validator(mode="after")
    def _one_of_both(self) -> "Figure":
        if (self.points is None) == (self.motion is None):
            raise ValueError("expected either points or motion")
        return self


def _kind(given: Any) -> str:
    """The kind of a lane's control, so that an error is about the fields of that kind."""
    posed = isinstance(given, Figure) or (
        isinstance(given, dict) and not given.keys().isdisjoint(Figure.model_fields)
    )
    return "figure" if posed else "camera"


LaneControl = Annotated[
    Annotated[Deflections, Tag("camera")] | Annotated[Figure, Tag("figure")], Discriminator(_kind)
]


class Shown(Message):
    """The frames that the client has shown last: `frames` of the frames of `step`."""

    step: Sequence
    frames: Annotated[int, Field(ge=0, le=64)]


class Hello(Message):
    """The first message. `resume` is the token of an earlier connection. Of the formats, the server
    takes h264 for tall video and the first of the others for all other video."""

    type: Literal["hello"]
    protocol: int
    resume: Annotated[str, Field(max_length=100)] | None = None
    formats: Annotated[list[Literal["jpeg", "webp", "h264"]], Field(max_length=8)] = ["jpeg"]


class Open(Message):
    """Opens a world. `image` is "sample", a gallery name or the id of an upload. With `log`, the id
    of an action log, the log is replayed and image, prompt, seed and pose are ignored; with
    `saved`, the id of a world saved on its way, from there on. `pose` is that of the figure in the
    image, for a model that follows poses; without it the figure stands as in the first frame of
    "still"."""

    type: Literal["open"]
    image: Annotated[str, Field(max_length=MAX_NAME)] = "sample"
    prompt: Prompt | None = None
    seed: Seed = 0
    pose: Points | None = None
    log: Annotated[str, Field(max_length=100)] | None = None
    saved: Annotated[str, Field(max_length=100)] | None = None


class Input(Deflections):
    """The state of the controls of a lane; a later message replaces it. `taps` hold for exactly one
    step: the deflection of keys that were pressed and released since the message before."""

    type: Literal["input"]
    lane: Annotated[int, Field(ge=0, le=1)] = 0
    sequence: Sequence
    time: Annotated[Milliseconds, Field(description="of the client's clock; sent back")]
    taps: Deflections | None = None
    shown: Shown | None = None


class PoseInput(Figure):
    """The control of a lane's figure, for a model that follows poses; a later message replaces it.
    A step moves the figure from the pose it has towards this one, in its video frames."""

    type: Literal["pose"]
    lane: Annotated[int, Field(ge=0, le=1)] = 0
    sequence: Sequence
    time: Annotated[Milliseconds, Field(description="of the client's clock; sent back")]
    shown: Shown | None = None


class ChangePrompt(Message):
    """Changes the prompt from the next step on."""

    type: Literal["prompt"]
    sequence: Sequence
    text: Prompt


class Play(Message):
    type: Literal["play"]


class Pause(Message):
    type: Literal["pause"]


class Reset(Message):
    """Starts the world again, with another seed if one is given. Branches and log start anew."""

    type: Literal["reset"]
    seed: Seed | None = None


class Redo(Message):
    """Switches redo: a pass whose frames are not all shown is made again when the control
    changes."""

    type: Literal["redo"]
    on: bool


class Seek(Message):
    """Pauses at a step of a branch. Playing on from a past step makes a new branch."""

    type: Literal["seek"]
    branch: Sequence
    step: Sequence


class Follow(Message):
    """Plays the recorded controls of a branch from this step on, under the prompt in force: "change
    the prompt in the past and replay forward". Input is ignored meanwhile; pause ends it."""

    type: Literal["follow"]
    branch: Sequence


class Split(Message):
    """Two forks of one step, played in turn as lanes 0 and 1. A lane starts with its control, null
    for the present one, and then follows the input of its lane. With `controls` null the split
    ends, and lane 0 stays."""

    type: Literal["split"]
    branch: Sequence = 0
    step: Sequence = 0
    controls: Annotated[list[LaneControl | None], Field(min_length=2, max_length=2)] | None = None


class GetLog(Message):
    type: Literal["log"]


class Save(Message):
    """Asks for the latest snapshot as a file, a binary message of kind 2, with which another server
    can go on. No answer if none is within `save_bytes`."""

    type: Literal["save"]


class Record(Message):
    """Asks for the video of a branch's steps `first` to `last` as it was shown: a binary message of
    kind 1, an MP4. With `first` 0 the first frame is in it. One at a time."""

    type: Literal["record"]
    branch: Sequence
    first: Sequence
    last: Sequence


class Ping(Message):
    type: Literal["ping"]
    time: Milliseconds


ClientMessage = Annotated[
    Hello
    | Open
    | Input
    | PoseInput
    | ChangePrompt
    | Play
    | Pause
    | Reset
    | Redo
    | Seek
    | Follow
    | Split
    | GetLog
    | Save
    | Record
    | Ping,
    Field(discriminator="type"),
]


class Picture(Message):
    name: str
    url: str
    prompt: str


class Limits(Message):
    """Limits of the server: bytes and pixels of an upload, bytes and messages per second of a
    connection, bytes of a saved world, steps of a world and of a recording, seconds until an idle
    world ends and for which a lost one is kept."""

    upload_bytes: int
    upload_pixels: int
    message_bytes: int
    messages_per_second: float
    save_bytes: int
    steps: int
    record_steps: int
    idle_seconds: float
    keep_seconds: float


class FigureFacts(Message):
    """Names of what moves a figure: the points of a pose, and the motions. A limb is a pair of
    points, with its colour in the skeleton that the model sees."""

    points: list[str]
    limbs: list[tuple[int, int]]
    colours: Annotated[list[str], Field(description="#rrggbb")]
    motions: list[str]


class Welcome(Message):
    """The answer to hello. With `resumed` an "opened" follows without an open."""

    type: Literal["welcome"] = "welcome"
    protocol: int = PROTOCOL
    version: str
    model: str
    digest: str
    driven_by: Literal["camera", "pose", "prompt"]
    figure: FigureFacts | None = None
    width: int
    height: int
    fps: int
    frames_per_step: int
    format: Literal["jpeg", "webp", "h264"]
    prompts: list[str]
    gallery: list[Picture]
    ranges: Annotated[
        dict[str, tuple[float, float]], Field(description="deflections are clamped to them")
    ]
    token: str
    resumed: bool
    capacity: int
    batch: Annotated[
        bool,
        Field(
            description="worlds due at once share a pass: near the bits of a run alone, not same"
        ),
    ] = False
    limits: Limits


class Queued(Message):
    """All places are taken; `place` 1 is the next to be let in."""

    type: Literal["queued"] = "queued"
    place: int


class Replaying(Message):
    """Sent between the steps of a long seek or an opened log."""

    type: Literal["replaying"] = "replaying"
    done: int
    total: int


class Opened(Message):
    """The world stands paused at this step; its frames follow in a binary message."""

    type: Literal["opened"] = "opened"
    branch: int
    step: int
    seed: int
    prompt: str


class Posed(Message):
    """The poses of a step's video frames, sent before the frames of a model that follows poses."""

    type: Literal["posed"] = "posed"
    lane: int
    branch: int
    step: int
    poses: list[list[tuple[float, float] | None]]


class BranchFacts(Message):
    """Steps from_step + 1 to to_step of a branch; the earlier steps are those of its parent."""

    id: int
    parent: int | None
    from_step: int
    to_step: int
    prompt: Annotated[str, Field(description="of the branch's last step")]


class SnapshotFacts(Message):
    branch: int
    step: int


class Tree(Message):
    """All branches, and the steps to which a jump is at once. Bytes of their snapshots."""

    type: Literal["tree"] = "tree"
    branches: list[BranchFacts]
    snapshots: list[SnapshotFacts]
    bytes: int
    budget: int
    replay_ms: Annotated[float, Field(description="expected, for each replayed step of a jump")]


class Sought(Message):
    type: Literal["sought"] = "sought"
    branch: int
    step: int
    prompt: str
    replayed: int
    ms: float


class State(Message):
    """Sent after play, pause, seek and follow, and when followed controls have ended."""

    type: Literal["state"] = "state"
    playing: bool
    following: bool
    branch: int
    step: int


class SplitAnswer(Message):
    """The branches of lanes 0 and 1; null when a split has ended, with the branch that stays."""

    type: Literal["split"] = "split"
    branches: list[int] | None
    branch: int


class LogAnswer(Message):
    type: Literal["log"] = "log"
    lines: list[str]


class Uploaded(Message):
    """The answer to an upload: its id, or why it is refused."""

    type: Literal["uploaded"] = "uploaded"
    id: str | None = None
    error: str | None = None


class Pong(Message):
    type: Literal["pong"] = "pong"
    time: float


ErrorCode = Literal[
    "protocol",
    "malformed",
    "flood",
    "token",
    "unknown",
    "not_open",
    "limit",
    "upload",
    "log",
    "record",
    "failed",
]


class Error(Message):
    """Tell of an error; the server closes the connection after a fatal one."""

    type: Literal["error"] = "error"
    code: ErrorCode
    message: str
    fatal: bool


class Ended(Message):
    """The world has ended. idle: nobody played; moved: another connection has resumed it."""

    type: Literal["ended"] = "ended"
    reason: Literal["idle", "moved", "limit", "failed"]


ServerMessage = Annotated[
    Welcome
    | Queued
    | Replaying
    | Opened
    | Posed
    | Tree
    | Sought
    | State
    | SplitAnswer
    | LogAnswer
    | Uploaded
    | Pong
    | Error
    | Ended,
    Field(discriminator="type"),
]

_client = TypeAdapter(ClientMessage)


class ProtocolError(ValueError):
    """A message that ends its connection, in one line; `code` is that of `Error`."""

    def __init__(self, message: str, code: ErrorCode = "malformed"):
        super().__init__(message)
        self.code = code


def parse(text: str) -> ClientMessage:
    """Reads a client's message. ProtocolError names the field, what was expected and was given."""
    try:
        return _client.validate_json(text, strict=True)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        place = ".".join(str(part) for part in first["loc"]) or "message"
        given = str(first["input"])[:40]
        raise ProtocolError(f"{place}: {first['msg']}, got {given!r}") from None


LAYOUT = (  # of the header: field of `FrameHeader` and its code in `struct`
    *(("magic", "4s"), ("protocol", "B"), ("kind", "B"), ("lane", "B"), ("flags", "B")),
    *(("branch", "I"), ("step", "I"), ("input", "I"), ("prompt", "I"), ("time", "d")),
    *(("wait_ms", "f"), ("model_ms", "f"), ("pixels_ms", "f"), ("encode_ms", "f")),
    *(("first_shown", "B"), ("count", "B"), ("format", "H"), ("reserved", "12s")),
)
HEADER = struct.Struct("<" + "".join(code for _, code in LAYOUT))
MAGIC = b"AAPT"


@dataclass(frozen=True)
class FrameHeader:
    """The header of a binary message.

    Attributes:
        kind: FRAMES, or one file: RECORDING, an MP4; SAVED, a world (safetensors). A file's header
            has branch and step, the rest is 0.
        lane: 0; in a split also 1.
        flags: FIRST, the frame that opens a world; REDO, the pass was made again; SEEK, the answer
            to a seek.
        branch, step: The place in the tree.
        input, prompt: Sequences of the latest input and prompt that this pass honoured.
        time: `time` of that input, in milliseconds of the client's clock.
        wait_ms: By how much the pass began late.
        model_ms, pixels_ms: Making the frames, decoder included, and waiting for their pixels. On a
            CUDA device the former is the launch of a graph and the latter its time.
        encode_ms: Encoding the images.
        first_shown: After a redo, the index of the first frame that replaces an earlier one.
        count, format: Number of images, and the index of their format in FORMATS. Images of h264
            are access units (Annex B); the first of a message is an IDR picture, and none refers
            to another message.
    """

    branch: int
    step: int
    count: int
    kind: int = FRAMES
    lane: int = 0
    flags: int = 0
    input: int = 0
    prompt: int = 0
    time: float = 0.0
    wait_ms: float = 0.0
    model_ms: float = 0.0
    pixels_ms: float = 0.0
    encode_ms: float = 0.0
    first_shown: int = 0
    format: int = 0

    def message(self, images: list[bytes]) -> bytes:
        """The binary message of these images."""
        known = {"magic": MAGIC, "protocol": PROTOCOL, "reserved": b""}
        fields = (known.get(name, getattr(self, name, None)) for name, _ in LAYOUT)
        lengths = struct.pack(f"<{len(images)}I", *map(len, images))
        return b"".join([HEADER.pack(*fields), lengths, *images])


def read_frames(message: bytes) -> tuple[FrameHeader, list[bytes]]:
    """Reads a binary message: its header, and the encoded images. ValueError for another one."""
    if len(message) < HEADER.size or message[:4] != MAGIC or message[4] != PROTOCOL:
        raise ValueError(f"message: expected frames of protocol {PROTOCOL}, got {message[:5]!r}")
    values = dict(zip((name for name, _ in LAYOUT), HEADER.unpack_from(message)))
    for name in ("magic", "protocol", "reserved"):
        del values[name]
    header = FrameHeader(**values)
    lengths = struct.unpack_from(f"<{header.count}I", message, HEADER.size)
    images, start = [], HEADER.size + 4 * header.count
    for length in lengths:
        images.append(message[start : start + length])
        start += length
    if start != len(message):
        raise ValueError(f"message: expected {start} bytes, as its lengths say, got {len(message)}")
    return header, images


def schema() -> dict[str, Any]:
    """JSON Schema of all text messages, and the layout of the header of binary ones."""
    types = {"4s": "bytes", "12s": "bytes", "B": "u8", "H": "u16", "I": "u32"}
    types |= {"d": "f64", "f": "f32"}
    offset, header = 0, []
    for name, code in LAYOUT:
        size = struct.calcsize(code)
        header.append({"name": name, "type": types[code], "offset": offset, "bytes": size})
        offset += size
    return {
        "protocol": PROTOCOL,
        "client": _client.json_schema(),
        "server": TypeAdapter(ServerMessage).json_schema(mode="serialization"),
        "binary": {
            "byte_order": "little",
            "header": header,
            "header_bytes": HEADER.size,
            "after_header": "count lengths (u32), then the images",
            "kinds": {"frames": FRAMES, "recording": RECORDING, "saved": SAVED},
            "flags": {"first": FIRST, "redo": REDO, "seek": SEEK},
            "formats": list(FORMATS),
        },
    }
