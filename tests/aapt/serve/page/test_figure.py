"""The figure on the page: how its joints move each other, dragged joints, motions, a rewind."""

import numpy as np
import pytest

from aapt import StreamingGenerator
from aapt.model.pose import LIMBS, POINTS
from aapt.streaming.poses import load_poses

from ...streaming.test_generator import HEIGHT, WIDTH
from ..conftest import Running
from ..pose_checkpoint import pose_checkpoint
from .tab import Tab, page_end

STILL = load_poses("still").first.points[0, :, :2]
HEAD, NECK, SHOULDER, ELBOW, WRIST, HIP, KNEE, ANKLE = 0, 1, 2, 3, 4, 8, 9, 10
ARM, LEG = [SHOULDER, ELBOW, WRIST], [HIP, KNEE, ANKLE]
ASPECT = WIDTH / HEIGHT


@pytest.fixture(scope="module")
def puppet(tmp_path_factory):
    """A server of a small random model that follows poses, at the pace of a real one."""
    folder = pose_checkpoint(tmp_path_factory.mktemp("world") / "small-puppet", fps=24)
    running = Running(StreamingGenerator.from_pretrained(folder), str(folder))
    yield running
    running.stop()


@pytest.fixture
def page(open_page, puppet):
    return open_page(puppet).wait_state("ready")


@pytest.fixture(scope="module")
def modules(browser, puppet):
    """A page whose modules are called by themselves."""
    page = Tab(browser, puppet.address)
    yield page
    page.context.close()


@pytest.fixture
def drag(modules):
    """Drags a joint of a pose; returns the points after it."""

    def call(points, joint, place, aspect=1.0):
        return modules.tab.evaluate(
            """async ([points, joint, place, aspect]) => {
                const { dragged, limbLengths } = await import("/static/kinematics.js");
                return dragged(points, joint, place, aspect, limbLengths(points, aspect));
            }""",
            [np.asarray(points).tolist(), joint, list(place), aspect],
        )

    return lambda *args, **options: np.array(call(*args, **options))


def lengths(points, aspect=1.0):
    places = np.asarray(points) * (aspect, 1)
    return np.array([np.hypot(*(places[b] - places[a])) for a, b in LIMBS])


def test_a_wrist_takes_the_elbow_with_it(drag):
    """Two limbs reach for a place; too far away they are straight, and point to it."""
    place = STILL[SHOULDER] + (-0.05, -0.12)
    found = drag(STILL, WRIST, place)
    assert np.allclose(found[WRIST], place, atol=1e-6)
    others = [point for point in range(14) if point not in (ELBOW, WRIST)]
    assert np.allclose(found[others], STILL[others])
    assert np.allclose(lengths(found), lengths(STILL))
    far = drag(STILL, WRIST, STILL[SHOULDER] + (-0.3, -0.3))
    arm = far[ARM] - far[SHOULDER]
    assert np.allclose(lengths(far), lengths(STILL), atol=1e-6)
    assert np.allclose(np.arctan2(*arm[1:].T), np.arctan2(-0.3, -0.3), atol=1e-3)


def test_an_elbow_stays_on_its_side_of_the_arm(drag):
    """Dragged around in small steps, the elbow never jumps over the line from shoulder to wrist."""

    def side(points):
        arm, elbow = points[WRIST] - points[SHOULDER], points[ELBOW] - points[SHOULDER]
        return arm[0] * elbow[1] - arm[1] * elbow[0]

    points, before = drag(STILL, WRIST, STILL[SHOULDER] + (-0.1, 0.1)), None
    for turn in np.linspace(2.4, 5.5, 12):
        points = drag(
            points, WRIST, points[SHOULDER] + 0.14 * np.array([np.cos(turn), np.sin(turn)])
        )
        assert np.sign(side(points)) == (before or np.sign(side(points)))
        before = np.sign(side(points))


@pytest.mark.parametrize("aspect", [1.0, 1.6])
def test_other_joints_turn_about_their_parents_with_all_that_hangs_by_them(drag, aspect):
    elbow = drag(STILL, ELBOW, STILL[SHOULDER] + (-0.2, 0), aspect)
    way = (elbow[ELBOW] - elbow[SHOULDER]) * (aspect, 1)
    assert way[0] < 0 and abs(way[1]) < 1e-6
    assert np.allclose(lengths(elbow, aspect), lengths(STILL, aspect), atol=1e-6)
    assert np.allclose(np.delete(elbow, [ELBOW, WRIST], axis=0), np.delete(STILL, [3, 4], axis=0))
    neck = drag(STILL, NECK, STILL[NECK] + (0.1, 0), aspect)
    moved = np.abs(neck - STILL).max(axis=1) > 1e-6
    assert moved.tolist() == [point < HIP for point in range(14)]  # the legs stand
    hips = neck[[8, 11]].mean(axis=0) * (aspect, 1)
    before = np.hypot(*(STILL[NECK] * (aspect, 1) - hips))
    assert np.isclose(np.hypot(*(neck[NECK] * (aspect, 1) - hips)), before)
    head = drag(STILL, HEAD, STILL[NECK] + (0.1, -0.1), aspect)
    assert (np.abs(head - STILL).max(axis=1) > 1e-6).tolist() == [True] + 13 * [False]


def test_a_hip_moves_the_figure_which_stays_in_the_image(drag):
    found = drag(STILL, HIP, STILL[HIP] + (0.1, -0.05))
    assert np.allclose(found, STILL + (0.1, -0.05))
    edge = drag(STILL, HIP, STILL[HIP] + (0.9, 0.0))
    assert np.allclose(edge - STILL, (edge - STILL)[0], atol=1e-9) and 0.99 < edge.max() <= 1
    foot = drag(STILL, ANKLE, STILL[ANKLE] + (0, 0.5))
    assert foot.min() >= 0 and foot.max() <= 1 and np.allclose(lengths(foot), lengths(STILL))


def test_a_figure_partly_outside_the_image_keeps_its_lengths(drag):
    low = STILL + (0, 0.3)
    found = drag(low, HIP, low[HIP] + (0.1, 0.0))
    assert low.max() > 1.1 and np.allclose(found, low + (0.1, 0.0))
    further = drag(low, HIP, low[HIP] + (0.0, 0.2))
    assert np.allclose(further, low, atol=1e-3)


def test_an_arm_without_length_is_dragged_to_a_place(drag):
    """Shoulder and elbow of a log may be one point."""
    points = STILL.copy()
    points[ELBOW] = points[SHOULDER]
    found = drag(points, WRIST, points[SHOULDER] + (-0.2, 0.0))
    assert np.isfinite(found).all() and np.allclose(found[ELBOW], points[SHOULDER])


def test_a_hidden_point_stays_hidden(modules):
    points = modules.tab.evaluate(
        """async (points) => {
            const { dragged, limbLengths } = await import("/static/kinematics.js");
            points[3] = null; // without an elbow the wrist turns about nothing
            return dragged(points, 4, [0.3, 0.3], 1, limbLengths(points, 1));
        }""",
        STILL.tolist(),
    )
    assert points[3] is None and np.allclose(points[4], (0.3, 0.3))
    assert np.allclose(points[5:], STILL[5:])


def centre(page, joint, lane=0):
    """The middle of a joint in pixels of the page."""
    box = page.tab.locator(f"#figure{lane} [aria-label='{joint}'] .dot").bounding_box()
    return box["x"] + box["width"] / 2, box["y"] + box["height"] / 2


def pull(page, joint, x, y, lane=0):
    """Drags a joint by a way in shares of the image, and keeps it."""
    box = page.tab.locator(f"#figure{lane}").bounding_box()
    start = centre(page, joint, lane)
    page.tab.mouse.move(*start)
    page.tab.mouse.down()
    for share in (0.3, 0.6, 1.0):
        page.tab.mouse.move(
            start[0] + share * x * box["width"], start[1] + share * y * box["height"]
        )


def poses(page):
    return [message for message in page.sent if message["type"] == "pose"]


def written(page, name):
    """The text of an element, also of one that is hidden again."""
    return page.tab.text_content(f"#{name}")


def honoured(page, steps):
    """Plays on until a number of steps has honoured the last pose of the page; pauses."""
    last = poses(page)[-1]["sequence"]
    page.wait(lambda: page.frames[-1][0].input >= last, "the last pose")
    page.wait_step(page.frames[-1][0].step + steps)
    page.pause()


def walk(puppet):
    """The walk of the newest world, its branch and step."""
    place = list(puppet.play.sessions.values())[-1].place
    return place.walk, place.branch, place.step


def test_a_dragged_joint_moves_the_figure_and_gets_its_receipt(page, puppet):
    assert page.text("hint").startswith("Move the figure.") and page.tab.is_hidden("#keys")
    assert page.tab.get_attribute("#figure0 [aria-label='right wrist']", "role") == "slider"
    before = len(poses(page))  # the figure holds its first pose
    pull(page, "right wrist", -0.08, -0.25)
    page.wait_state("playing")
    first = poses(page)[before]["sequence"]
    page.wait(lambda: any(h.input >= first and h.step for h, _ in page.frames), "the first frames")
    page.wait(lambda: written(page, "receipt").startswith("Right wrist in "), "the receipt")
    page.tab.mouse.up()
    honoured(page, steps=4)
    goal = np.array(poses(page)[-1]["points"])
    assert np.allclose(goal[WRIST] - STILL[WRIST], (-0.08, -0.25), atol=0.02)
    assert np.allclose(lengths(goal, ASPECT), lengths(STILL, ASPECT), atol=1e-4)
    found, branch, step = walk(puppet)
    reached = found.pose_at(branch, step).points[-1]
    assert np.allclose(reached[:, :2], goal, atol=1e-4)
    assert page.tab.is_hidden("#hint") and not page.inputs()


def test_keys_of_a_camera_do_nothing(page):
    page.tab.keyboard.press("w")
    page.tab.keyboard.press("ArrowLeft")
    box = page.tab.locator("#stage").bounding_box()
    page.tab.mouse.move(box["x"] + 5, box["y"] + 5)
    page.tab.mouse.down()
    page.tab.mouse.move(box["x"] + 60, box["y"] + 60, steps=3)
    page.tab.mouse.up()
    page.tab.wait_for_timeout(200)
    assert page.state == "ready" and page.tab.is_hidden("#stick") and not page.inputs()


def test_a_motion_loops_until_the_figure_holds(page, puppet):
    page.tab.click("#motions button:has-text('wave')")
    page.wait_step(14)
    assert poses(page)[-1].get("motion") == "wave"
    assert page.tab.get_attribute("#motions [value=wave]", "aria-pressed") == "true"
    found, branch, _ = walk(puppet)
    script = load_poses("wave")
    expected = np.stack([script.at((4 * 12 + 1 + frame) / 24) for frame in range(4)])
    assert np.allclose(found.pose_at(branch, 13).points, expected, atol=1e-4)
    page.tab.click("#motions button:has-text('hold')")
    page.wait(lambda: page.tab.get_attribute("#motions [value='']", "aria-pressed") == "true")
    honoured(page, steps=3)
    held = poses(page)[-1]
    found, branch, step = walk(puppet)
    last = found.pose_at(branch, step).points
    assert np.allclose(last[..., :2], held["points"], atol=1e-4)  # it stands


def test_the_keyboard_moves_a_joint(page):
    page.tab.focus("#stage")
    reached = []
    for _ in range(14):
        page.tab.keyboard.press("Tab")
        reached.append(page.tab.evaluate("document.activeElement.getAttribute('aria-label')"))
    assert reached == list(POINTS)
    ring = page.tab.evaluate("getComputedStyle(document.activeElement).outlineStyle")
    assert ring == "solid"
    page.tab.focus("#figure0 [aria-label='left wrist']")
    said = "document.activeElement.getAttribute('aria-valuetext')"
    assert page.tab.evaluate(said) == "61 % from the left, 69 % from the top"
    page.tab.keyboard.press("Shift+ArrowUp")
    page.tab.keyboard.press("ArrowLeft")
    page.wait_state("playing")
    assert page.tab.evaluate(said).endswith("64 % from the top")
    moved = np.array(poses(page)[-1]["points"])
    assert np.allclose(moved[7] - STILL[7], (-0.01 / ASPECT, -0.05), atol=1e-3)


def test_a_rewind_shows_the_pose_of_its_step_and_goes_on_from_there(page, puppet):
    page.tab.click("#motions button:has-text('jump')")
    page.wait_step(12)
    page.tab.click("#motions button:has-text('hold')")
    page.pause()
    page.seek(5)
    found, branch, _ = walk(puppet)
    expected = found.pose_at(branch, 5).points[-1, :, :2]

    def shown():
        box = page.tab.locator("#figure0").bounding_box()
        x, y = centre(page, "right ankle")
        return (x - box["x"]) / box["width"], (y - box["y"]) / box["height"]

    page.wait(lambda: np.allclose(shown(), expected[ANKLE], atol=0.01), "the pose of step 5")
    page.wait(lambda: np.allclose(poses(page)[-1].get("points", 0), expected, atol=1e-4))
    assert "A moved joint makes a new branch." in page.text("past")
    pull(page, "left wrist", 0.05, -0.2)
    page.tab.mouse.up()
    page.wait(lambda: page.place[0] == 1, "a branch")
    page.pause()
    found, branch, step = walk(puppet)
    path = found.path(branch, step)
    before, after = path[4].pose.points[-1], path[5].pose.points[0]
    assert np.abs(after - before).max() < 0.06  # no jump


def test_a_joint_is_moved_while_the_page_still_jumps(page, puppet):
    """The pose of the drag counts, not that of the step that the server then shows."""
    page.tab.click("#motions button:has-text('still')")
    page.wait_step(9)
    page.tab.keyboard.press("z")
    pull(page, "right wrist", -0.05, -0.2)
    page.tab.mouse.up()
    page.wait(lambda: page.place[0] == 1, "a branch")
    honoured(page, steps=5)
    found, branch, step = walk(puppet)
    goal = np.array(poses(page)[-1]["points"])
    assert np.abs(goal[WRIST] - STILL[WRIST]).max() > 0.1
    assert np.allclose(found.pose_at(branch, step).points[-1, :, :2], goal, atol=1e-4)


def test_recorded_poses_are_replayed_and_their_end_is_held(page, puppet):
    pull(page, "right wrist", -0.08, -0.25)
    page.tab.mouse.up()
    page.wait_step(9)
    page.pause()
    end = page_end(page)
    page.seek(1)
    page.tab.click("#themes button:has-text('cd')")
    page.replay("Replaying your poses")
    page.wait_state("paused")
    found, branch, step = walk(puppet)
    assert (branch, step) == (1, end)
    for number in range(1, end + 1):
        assert found.pose_at(1, number) == found.pose_at(0, number)
    last = found.pose_at(1, end).points[-1, :, :2]
    page.wait(lambda: np.allclose(poses(page)[-1].get("points", 0), last, atol=1e-4), "the hold")


@pytest.mark.parametrize("taken", ["joint", "hold"])
def test_a_replay_ends_when_the_player_takes_over(page, taken):
    page.tab.click("#motions button:has-text('walk')")
    page.wait_step(20)
    page.tab.click("#motions button:has-text('hold')")
    page.pause()
    page.seek(1)
    page.tab.click("#replay")
    page.wait_step(6)
    if taken == "joint":
        said = len(page.texts)
        page.tab.focus("#figure0 [aria-label='left wrist']")
        page.tab.keyboard.press("Shift+ArrowUp")
        # The joint pauses the replay and plays on: that pause is not the one waited for below
        page.wait(lambda: any(text.get("playing") for text in page.texts[said:]), "the takeover")
        page.wait_state("playing")
        page.pause()
    else:
        page.tab.click("#motions button:has-text('hold')")
        page.wait_state("paused")
    goal = poses(page)[-1]["points"]
    box = page.tab.locator("#figure0").bounding_box()
    x, y = centre(page, "left wrist")
    shown = (x - box["x"]) / box["width"], (y - box["y"]) / box["height"]
    assert np.allclose(shown, goal[7], atol=0.01)  # the joints show what was sent


def test_two_figures_are_driven_side_by_side(page, puppet):
    page.tab.click("#motions button:has-text('walk')")
    page.wait_step(2)
    page.tab.keyboard.press("x")
    page.wait(lambda: {0, 1} <= {header.lane for header, _ in page.frames}, "both lanes")
    assert "walk" in page.text("tag0") and "dance" in page.text("tag1")
    assert page.tab.is_hidden("#motions") and page.tab.is_visible("#figure1")
    page.pause()  # a joint that dances is hard to catch
    pull(page, "right wrist", 0.0, -0.1, lane=1)
    page.tab.mouse.up()
    page.wait(lambda: poses(page)[-1]["lane"] == 1 and "your pose" in page.text("tag1"))
    page.tab.select_option("#control0", label="wave")
    page.wait(lambda: "wave" in page.text("tag0"))
    page.wait(lambda: (poses(page)[-1]["lane"], poses(page)[-1].get("motion")) == (0, "wave"))
    page.tab.click("#keep1")
    page.wait(lambda: page.tab.is_hidden("#lane1"))
    page.wait(lambda: page.tab.get_attribute("#motions [value='']", "aria-pressed") == "true")
    goal = next(message["points"] for message in reversed(poses(page)) if message["lane"] == 1)
    honoured(page, steps=5)
    found, branch, step = walk(puppet)
    assert np.allclose(found.pose_at(branch, step).points[-1, :, :2], goal, atol=1e-4)


def test_the_skeleton_is_over_the_video_beside_it_or_hidden(page):
    def boxes():
        return [page.tab.locator(name).bounding_box() for name in ("#lane0", "#figure0")]

    video, figure = boxes()
    assert video == figure
    page.tab.select_option("#figure-place", "beside")
    page.wait(lambda: boxes()[1]["x"] >= boxes()[0]["x"] + boxes()[0]["width"], "beside")
    video, figure = boxes()
    assert figure["width"] == pytest.approx(video["width"], abs=1)
    page.tab.select_option("#figure-place", "hidden")
    assert page.tab.is_hidden("#figure0")
    page.tab.reload()
    page.wait_state("ready")
    assert page.tab.is_hidden("#figure0")  # the choice stays


def test_a_figure_is_dragged_by_touch_on_a_phone(open_page, puppet):
    size = {"width": 360, "height": 740}
    page = open_page(puppet, viewport=size, has_touch=True, is_mobile=True).wait_state("ready")
    assert page.tab.evaluate("document.documentElement.scrollWidth") <= 360
    page.painted()  # a browser scrolls until it has painted what takes the touch instead
    x, y = centre(page, "left wrist")
    touch = page.context.new_cdp_session(page.tab)
    for kind, points in (
        ("touchStart", [{"x": x + 4, "y": y + 4}]),  # a finger is not exact
        ("touchMove", [{"x": x + 10, "y": y - 20}]),
        ("touchMove", [{"x": x + 20, "y": y - 50}]),
        ("touchEnd", []),
    ):
        touch.send("Input.dispatchTouchEvent", {"type": kind, "touchPoints": points})
        page.painted()
    page.wait_step(3)
    moved = np.array(poses(page)[-1]["points"])
    assert moved[7, 1] < STILL[7, 1] - 0.03


def test_a_page_that_is_loaded_again_goes_on_with_its_pose(page, puppet):
    page.tab.click("#motions button:has-text('dance')")
    page.wait_step(4)
    page.pause()
    place = page.place
    page.tab.reload()
    page.wait_state("paused")
    page.wait(lambda: page.place == place, "the place before")
    found, branch, step = walk(puppet)
    expected = found.pose_at(branch, step).points[-1, :, :2]
    page.wait(lambda: poses(page))
    page.wait(lambda: np.allclose(poses(page)[-1].get("points") or 0, expected, atol=1e-4))
