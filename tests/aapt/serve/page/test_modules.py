"""Modules of the page by themselves, in the browser that runs them."""

import numpy as np


def test_the_pacer_spaces_frames_evenly_and_drains_a_backlog(page):
    times = page.tab.evaluate(
        """async () => {
            const { Pacer } = await import("/static/pacer.js");
            const pacer = new Pacer(160, 4), shown = [];
            const arrivals = [0, 160, 390, 480, 640, 800, 960, 1120, 1280]; // the third is late
            for (let now = 0, next = 0; now < 1500; now += 1) {
                if (now === arrivals[next]) {
                    const step = next += 1;
                    pacer.push([0, 1, 2, 3].map((index) => ({ step, index })), now);
                }
                const frame = pacer.take(now);
                if (frame) shown.push([now, frame.step, frame.index]);
            }
            return shown;
        }"""
    )
    assert [(step, index) for _, step, index in times] == [
        (step, index) for step in range(1, 10) for index in range(4)
    ]
    gaps = np.diff([now for now, _, _ in times])
    assert gaps[:7].tolist() == [40] * 7
    late = int(np.argmax(gaps))
    assert gaps[late] > 80 and late == 7  # before the first frame of the late pass
    assert gaps[late + 1 :].min() >= 28  # the backlog drains without a jump
    assert times[-4][0] - 1280 < 40  # and is gone


def test_a_pass_that_obeys_a_new_key_overtakes_what_is_queued(page):
    shown = page.tab.evaluate(
        """async () => {
            const { Pacer } = await import("/static/pacer.js");
            const pacer = new Pacer(160, 4), shown = [];
            const pass = (step) => [0, 1, 2, 3].map((index) => ({ step, index }));
            for (let now = 0; now < 400; now += 1) {
                if (now === 0) pacer.push(pass(1), now);
                if (now === 10) pacer.push(pass(2), now);
                if (now === 50) pacer.push(pass(3), now, true);
                const frame = pacer.take(now);
                if (frame) shown.push([now, frame.step, frame.index]);
            }
            return shown;
        }"""
    )
    assert [place[1:] for place in shown] == [[1, 0], [1, 1], [3, 0], [3, 1], [3, 2], [3, 3]]
    assert shown[2][0] == 50


def test_a_key_brings_the_next_pass_early_and_no_frame_is_lost(page):
    shown = page.tab.evaluate(
        """async () => {
            const { Pacer } = await import("/static/pacer.js");
            const pacer = new Pacer(160, 4), shown = [];
            const arrivals = [0, 160, 280, 480, 640]; // the third is early
            for (let now = 0, next = 0; now < 800; now += 1) {
                if (now === 200) pacer.hasten(now, 30);
                if (now === arrivals[next]) {
                    const step = next += 1;
                    pacer.push([0, 1, 2, 3].map((index) => ({ step, index })), now, step === 3);
                }
                const frame = pacer.take(now);
                if (frame) shown.push([now, frame.step, frame.index]);
            }
            return shown;
        }"""
    )
    assert [place[1:] for place in shown] == [
        [step, index] for step in range(1, 6) for index in range(4)
    ]
    times = {(step, index): now for now, step, index in shown}
    assert times[3, 0] == 280 and times[4, 0] <= 482
    gaps = np.diff([now for now, _, _ in shown])
    assert gaps[:4].tolist() == [40] * 4 and gaps.min() >= 26 and gaps.max() <= 57


def test_keys_in_four_passes_in_a_row_leave_no_gap_when_they_rest(page):
    """The server gains 40 ms once, and gives it back after the last key."""
    shown = page.tab.evaluate(
        """async () => {
            const { Pacer } = await import("/static/pacer.js");
            const pacer = new Pacer(160, 4), shown = [];
            const arrivals = [0, 160, 280, 440, 600, 760, 960, 1120];
            for (let now = 0, next = 0; now < 1280; now += 1) {
                if ([200, 300, 460, 620].includes(now)) pacer.hasten(now, 30);
                if (now === arrivals[next]) {
                    const step = next += 1;
                    const frames = [0, 1, 2, 3].map((index) => ({ step, index }));
                    pacer.push(frames, now, 3 <= step && step <= 6);
                }
                const frame = pacer.take(now);
                if (frame) shown.push([now, frame.step, frame.index]);
            }
            return shown;
        }"""
    )
    assert [place[1:] for place in shown] == [
        [step, index] for step in range(1, 9) for index in range(4)
    ]
    gaps = np.diff([now for now, _, _ in shown])
    assert gaps.min() >= 26 and gaps.max() <= 65


def test_a_key_hastens_no_frame_past_the_end_of_the_pass_under_way(page):
    """The next pass takes at least `lead` milliseconds, so frames are shown until then."""
    due = page.tab.evaluate(
        """async () => {
            const { Pacer } = await import("/static/pacer.js");
            const pacer = new Pacer(160, 4), left = [];
            pacer.push([0, 1, 2, 3].map((index) => ({ step: 1, index })), 0);
            for (const lead of [60, 30, 80]) {
                pacer.hasten(90, lead);
                left.push(pacer.backlog(90));
            }
            pacer.clear();
            pacer.hasten(90, 30);
            return [...left, pacer.backlog(90)];
        }"""
    )
    assert due == [60, 30, 30, 0]  # a later end than before changes nothing


def test_a_pass_made_again_replaces_what_is_not_shown(page):
    shown = page.tab.evaluate(
        """async () => {
            const { Pacer } = await import("/static/pacer.js");
            const pacer = new Pacer(160, 4), shown = [];
            pacer.push([0, 1, 2, 3].map((index) => ({ step: 5, index, made: 1 })), 0);
            for (let now = 0; now < 200; now += 1) {
                if (now === 50) pacer.replace([2, 3].map((index) => ({ step: 5, index, made: 2 })));
                const frame = pacer.take(now);
                if (frame) shown.push([frame.index, frame.made]);
            }
            return shown;
        }"""
    )
    assert shown == [[0, 1], [1, 1], [2, 2], [3, 2]]


def test_branches_find_their_owner_and_what_a_jump_replays(page):
    """Branch 0 has steps 1 to 20; 1 leaves it after step 8 and has 9 to 15; 2 leaves 1 after 12."""
    found = page.tab.evaluate(
        """async () => {
            const { Branches } = await import("/static/branches.js");
            const branches = new Branches();
            const tree = [[0, null, 0, 20], [1, 0, 8, 15], [2, 1, 12, 30]];
            branches.update({
                branches: tree.map(([id, parent, from_step, to_step]) => (
                    { id, parent, from_step, to_step, prompt: "" })),
                snapshots: [[0, 6], [0, 12], [1, 12], [1, 14], [2, 18]].map(
                    ([branch, step]) => ({ branch, step })),
                replay_ms: 10,
            });
            return {
                rows: branches.rows.map(({ id }) => id),
                owners: [3, 8, 9, 12, 13, 30].map((step) => branches.owner(2, step)),
                replayed: [5, 8, 12, 13, 17, 19].map((step) => branches.replayed(2, step)),
            };
        }"""
    )
    assert found["rows"] == [0, 1, 2]
    assert found["owners"] == [0, 0, 1, 1, 2, 2]
    # From 0; from 0:6; from 1:12; never from 0:12 or 1:14, which are not of this past; from 2:18.
    assert found["replayed"] == [5, 2, 0, 1, 5, 1]


def test_percentiles_are_nearest_ranks(page):
    values = page.tab.evaluate(
        """async () => {
            const { percentile } = await import("/static/receipts.js");
            const samples = [5, 1, 4, 2, 3];
            return [0.5, 0.99, 0.2].map((share) => percentile(samples, share))
                .concat([percentile([], 0.5)]);
        }"""
    )
    assert values == [3, 5, 1, None]


def test_frames_of_the_past_are_kept_within_a_budget(page):
    kept = page.tab.evaluate(
        """async () => {
            const { FrameMemory } = await import("/static/frame_memory.js");
            const canvas = Object.assign(document.createElement("canvas"), { width: 8, height: 8 });
            const blob = await new Promise((resolve) => canvas.toBlob(resolve, "image/jpeg"));
            const picture = new Uint8Array(await blob.arrayBuffer());
            const memory = new FrameMemory(), large = new Uint8Array(2 ** 20);
            for (let step = 0; step < 60; step += 1) {
                memory.put(0, step, "image/jpeg", [large, picture]); // a MiB and the last image
            }
            const steps = [];
            for (let step = 0; step < 60; step += 1) {
                if (await memory.last(0, step)) steps.push(step);
            }
            return steps;
        }"""
    )
    assert kept == list(range(60 - 47, 60))  # 48 MiB, less the small pictures
