from spike_export.engines.build.progress import BuildProgress

ROOT, LONG = "Building engine", "Computing profile costs"


def rise(progress: BuildProgress, seen: list[int]) -> None:
    assert not seen or progress.percent >= seen[-1]
    seen.append(progress.percent)


def test_progress_rises_to_100_through_repeating_nested_phases() -> None:
    progress, seen = BuildProgress(), [0]
    progress.start(ROOT, None, 6)
    for step in range(3):
        progress.step(ROOT, step)
        rise(progress, seen)
    progress.start(LONG, ROOT, 4)
    for step in range(4):
        # The same inner phase comes again and again, and never says how often it will.
        for _ in range(5):
            progress.start("Timing", LONG, 10)
            for inner in range(10):
                progress.step("Timing", inner)
                rise(progress, seen)
            progress.finish("Timing")
            rise(progress, seen)
        progress.step(LONG, step)
        rise(progress, seen)
    assert 90 <= seen[-1] <= 95
    assert len(set(seen)) > 20, "the long phase has to move the percentage, not only its end"
    progress.finish(LONG)
    progress.finish(ROOT)
    rise(progress, seen)
    assert seen[-1] == 100


def test_each_profile_takes_an_equal_part_of_the_long_phase() -> None:
    progress = BuildProgress()
    progress.start(ROOT, None, 1)
    progress.start(LONG, ROOT, 2)
    progress.step(LONG, 0)
    assert progress.percent == 50


def test_phases_never_announced_are_ignored() -> None:
    progress = BuildProgress()
    progress.step("unheard of", 3)
    progress.finish("unheard of")
    progress.start("orphan", "unheard of", 2)
    progress.step("orphan", 0)
    assert progress.percent == 0


def test_a_build_without_the_long_phase_still_ends_at_100() -> None:
    progress = BuildProgress()
    progress.start("Something new", None, 2)
    progress.step("Something new", 5)
    progress.finish("Something new")
    assert progress.percent == 100
