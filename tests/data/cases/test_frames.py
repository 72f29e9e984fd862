"""Frames of videos: their pixels and numbers, and files that are refused."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from polyclinic.data.cases.frames import Frame, FrameSelection
from polyclinic.data.examples import DataError
from polyclinic.data.federation import federate
from polyclinic.data.files import read_case
from polyclinic.data.formats import video
from polyclinic.data.formats.safe_reading import LIMITS
from polyclinic.data.quality.site_check import check_folder
from polyclinic.data.sources.folders import Folders
from polyclinic.data.sources.manifest import Manifest
from tests.support.data_sets import data_spec, loaded
from tests.support.known import known
from tests.support.slide_files import save_video

av = pytest.importorskip("av", reason="needs the video extra")
VALUES = [20 + 7 * i for i in range(30)]
CONTAINERS: dict[str, dict[str, Any]] = {
    "mkv": {"codec": "ffv1"},
    "avi": {"codec": "mjpeg", "pixels": "yuvj420p"},
    "mp4": {"codec": "libx264", "gop_size": 12, "max_b_frames": 3},
    "mov": {"codec": "mpeg4", "bit_rate": 4_000_000},
    "mpg": {"codec": "mpeg2video", "gop_size": 10, "max_b_frames": 2, "bit_rate": 4_000_000},
    "webm": {"codec": "libvpx-vp9"},
}


def shown(path: Path, number: int) -> float:
    return float(Frame(number).read(path).array.float().mean())


@pytest.mark.parametrize("kind", CONTAINERS)
def test_frames_are_numbered_in_the_order_in_which_they_are_shown(tmp_path: Path, kind: str) -> None:
    path = save_video(tmp_path / f"a.{kind}", VALUES, **CONTAINERS[kind])
    assert video.frame_count(path) == 30
    numbers = [0, 1, 2, 7, 28, 29, 3, 3, 15]  # forward, and back
    assert [shown(path, n) for n in numbers] == pytest.approx([VALUES[n] for n in numbers], abs=3.5)


def test_pixels_without_loss_are_those_that_were_written(tmp_path: Path) -> None:
    def drawn(i: int) -> np.ndarray:
        return np.random.default_rng(i).integers(0, 255, (48, 64, 3)).astype(np.uint8)

    path = save_video(tmp_path / "a.mkv", range(5), pixels="bgr0", draw=drawn)
    for i in range(5):
        volume = Frame(i).read(path)
        np.testing.assert_array_equal(volume.array[:, 0].movedim(0, -1).numpy(), drawn(i))
        assert (volume.full_scale, volume.units, volume.measured) == (255, "RGB", False)


def test_gray_videos_have_one_channel(tmp_path: Path) -> None:
    path = save_video(tmp_path / "a.mkv", VALUES, pixels="gray")
    assert Frame(3).read(path).array.shape == (1, 48, 64)
    assert shown(path, 3) == pytest.approx(VALUES[3], abs=1.5)


def test_every_nth_frame_is_an_example_of_its_video(tmp_path: Path) -> None:
    for i in range(6):
        save_video(tmp_path / "ab"[i % 2] / f"v{i}.mkv", [10 * i + k for k in range(10)])
    source = Folders(path=str(tmp_path), frames=FrameSelection(every=4))
    table = source.table()
    assert table.ids[:3] == tuple(f"a/v0.mkv#frame{n:07d}" for n in (0, 4, 8))
    assert table.columns["frame"][:3] == ("0", "4", "8")
    assert table.columns["video"][:3] == table.patients[:3] == ("a/v0.mkv",) * 3
    assert len(table) == 18
    examples = loaded(source.examples(table.ids))
    assert examples.inputs.shape == (18, 3, 48, 64)
    found = (examples[torch.arange(18)][0].mean((1, 2, 3)) * 255).round().tolist()
    numbers = [int(name.split("/v")[1][0]) * 10 + int(name[-2:]) for name in table.ids]
    assert found == pytest.approx(numbers, abs=1.5)
    spec = data_spec(
        path=str(tmp_path),
        kind="folders",
        frames={"every": 4},
        min_patients=1,
        video="video",
        sites={"partition": "iid", "count": 1},
    )
    roles = federate(spec).sites["site-1"]
    patients = [set(part.patients) for part in roles.values()]
    assert sum(map(len, patients)) == len(set.union(*patients)) == 6
    assert all(len(known(loaded(part).videos)) == len(part) for part in roles.values())
    other = replace(source, frames=FrameSelection(every=5))
    assert other.fingerprint != source.fingerprint == replace(source).fingerprint


def test_frames_can_stay_on_disk(tmp_path: Path) -> None:
    for i in range(4):
        save_video(tmp_path / "ab"[i % 2] / f"v{i}.mkv", VALUES[:6])
    source = Folders(path=str(tmp_path), frames=FrameSelection(every=3), patch=(32, 32))
    examples = source.examples(source.table().ids)
    assert examples.shape == (3, 32, 32)
    assert float(examples.image(1).mean()) * 255 == pytest.approx(VALUES[3], abs=1.5)


def test_a_table_names_frames_and_their_labels(tmp_path: Path) -> None:
    rows = ["path,frame,label,patient"]
    for i in range(4):
        save_video(tmp_path / f"v{i}.mkv", VALUES)
        rows += [f"v{i}.mkv,{k},{('normal', 'polyp')[k > 9]},p{i // 2}" for k in (12, 3)]
    (tmp_path / "m.csv").write_text("\n".join(rows))
    source = Manifest(str(tmp_path / "m.csv"), frames=FrameSelection(column="frame"))
    table = source.table()
    assert table.ids[:2] == ("v0.mkv#frame0000012", "v0.mkv#frame0000003")
    assert known(table.labels).tolist()[:2] == [1, 0]
    examples = source.examples(table.ids)
    found = examples[torch.arange(8)][0].mean((1, 2, 3)) * 255
    assert found.tolist() == pytest.approx([VALUES[12], VALUES[3]] * 4, abs=1.5)
    (tmp_path / "m.csv").write_text("path,frame,label\nv0.mkv,30,a\nv1.mkv,2,b\n")
    far = replace(source)
    with pytest.raises(DataError, match="has no frame 30: 30 can be decoded, counted from 0"):
        far.examples(far.table().ids)
    for text, reason in (
        ("path,frame,label\nv0.mkv,x,a\nv1.mkv,2,b\n", "states no number of a frame"),
        ("path,frame,label\nv0.mkv,-1,a\nv1.mkv,2,b\n", "states no number of a frame"),
        ("path,frame,label\nv0.mkv,2,a\nv0.mkv,2.0,b\n", "1 files are listed more than once"),
        ("path,label\nv0.mkv,a\n", "no column 'frame'"),
    ):
        (tmp_path / "m.csv").write_text(text)
        with pytest.raises(DataError, match=reason):
            replace(source).table()


@pytest.mark.parametrize("options", [{}, {"every": 2, "column": "frame"}, {"every": -1}])
def test_options_are_checked(options: dict[str, Any]) -> None:
    with pytest.raises(DataError, match="every"):
        FrameSelection(**options)


def test_a_video_without_frames_is_refused_with_the_key(tmp_path: Path) -> None:
    path = save_video(tmp_path / "a.mkv", VALUES[:3])
    with pytest.raises(DataError, match=r"is a video: select frames with frames = \{every = 25\}"):
        read_case([path])


def playlist(path: Path) -> None:
    path.with_name("secret.mov").write_bytes(path.read_bytes())
    path.write_text("#EXTM3U\n#EXT-X-TARGETDURATION:1\n#EXTINF:1,\nsecret.mov\n#EXT-X-ENDLIST\n")


def concat(path: Path) -> None:
    path.with_name("secret.mov").write_bytes(path.read_bytes())
    path.write_text("ffconcat version 1.0\nfile secret.mov\n")


def sound_only(path: Path) -> None:
    with av.open(str(path), "w") as file:
        stream = file.add_stream("pcm_s16le", rate=8000, layout="mono")
        sound = av.AudioFrame.from_ndarray(np.zeros((1, 800), np.int16), format="s16", layout="mono")
        sound.sample_rate = 8000
        for packet in (*stream.encode(sound), *stream.encode(None)):
            file.mux(packet)


HOSTILE: dict[str, tuple[Callable[[Path], object], str]] = {
    "empty": (lambda p: p.write_bytes(b""), "is empty"),
    "no video": (lambda p: p.write_bytes(b"no video" * 500), "is not a sound video"),
    "a playlist of other files": (playlist, "is not a sound video"),
    "a list of other files": (concat, "is not a sound video"),
    "sound only": (sound_only, "contains 0 streams of pictures"),
    "truncated header": (lambda p: p.write_bytes(p.read_bytes()[:200]), "is not a sound video|contains no frames"),
    "truncated index": (lambda p: p.write_bytes(p.read_bytes()[:-900]), "contains 0 streams of pictures"),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_files_are_refused(tmp_path: Path, name: str) -> None:
    path = save_video(tmp_path / "a.mov", VALUES, codec="libx264", bit_rate=4_000_000)
    change, reason = HOSTILE[name]
    change(path)
    with pytest.raises(DataError, match=reason):
        _ = [frame.read(path) for frame in FrameSelection(every=1).frames(path)]


@pytest.mark.parametrize("kind", ["mkv", "avi"])
def test_a_copy_that_stopped_in_the_middle_is_refused(tmp_path: Path, kind: str) -> None:
    path = save_video(tmp_path / f"a.{kind}", VALUES, **CONTAINERS[kind])
    path.write_bytes(path.read_bytes()[: path.stat().st_size * 6 // 10])
    with pytest.raises(DataError, match=r"is truncated: .* of the (3.0 seconds|30 frames)"):
        video.frame_count(path)


def test_a_codec_and_a_depth_that_are_not_expected_are_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="by a codec that is not read"):
        video.frame_count(save_video(tmp_path / "a.avi", VALUES[:3], codec="cinepak", pixels="rgb24"))
    deep = save_video(tmp_path / "a.mkv", VALUES[:3], pixels="yuv420p10le")
    with pytest.raises(DataError, match="more than 8 bits"):
        Frame(0).read(deep)


def test_limits_apply_before_a_frame_is_decoded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = save_video(tmp_path / "a.mkv", VALUES)
    for limits, reason in (
        (replace(LIMITS, side=60), "limit is 60 along an axis"),
        (replace(LIMITS, decoded_bytes=20_000), "the limit is 19.5 KiB"),
        (replace(LIMITS, file_bytes=100), "the limit is 100 bytes"),
    ):
        for read in (
            lambda p, limits=limits: video.frame_count(p, limits),
            lambda p, limits=limits: Frame(0).read(p, limits),
        ):
            with pytest.raises(DataError, match=reason):
                read(path)
    monkeypatch.setattr(video, "MOST_FRAMES", 10)
    with pytest.raises(DataError, match="more than 10 frames"):
        video.frame_count(path)


def test_damaged_videos_are_all_named_or_left_out(tmp_path: Path) -> None:
    for i in range(4):
        save_video(tmp_path / "ab"[i % 2] / f"v{i}.mkv", VALUES[:4])
    for name in ("a/v0.mkv", "b/v3.mkv"):
        (tmp_path / name).write_bytes(b"damaged" * 100)
    source = Folders(path=str(tmp_path), frames=FrameSelection(every=2))
    with pytest.raises(DataError) as refusal:
        source.table()
    assert [line.partition(":")[0] for line in refusal.value.problems] == ["v0.mkv", "v3.mkv"]
    kept = replace(source, unreadable="skip")
    assert len(kept.table()) == 4
    assert any(note.startswith("2 files were left out") for note in kept.info.notes)


def test_check_and_new_study_recognize_videos(tmp_path: Path) -> None:
    from polyclinic.data.quality.recognition import recognize
    from polyclinic.studies.config import study_config
    from polyclinic.studies.config.new_study import new_study

    for i in range(12):
        save_video(tmp_path / ("polyp", "normal")[i % 2] / f"v{i}.mkv", [5 * i + 2 * k for k in range(21)])
    recognized = recognize(tmp_path)
    assert recognized.options["frames"] == {"every": 10}
    report = check_folder(tmp_path)
    assert not [f.message for f in report.findings if f.level == "error"]
    study = study_config.parse(new_study(recognized, "v", 1).text)
    assert report.examples == len(study.data.source().table()) == 36
    assert not [f for f in report.findings if f.code == "near-duplicates"]


def test_the_check_warns_of_names_and_places_in_metadata(tmp_path: Path) -> None:
    path = save_video(tmp_path / "a.mkv", VALUES[:3])
    with av.open(str(path)) as old, av.open(str(tmp_path / "b.mkv"), "w") as new:
        new.metadata["title"] = "Mrs Example"
        stream = new.add_stream_from_template(old.streams.video[0])
        for packet in old.demux(video=0):
            if packet.dts is not None:
                packet.stream = stream
                new.mux(packet)
    assert video.personal_metadata(path) == []
    assert video.personal_metadata(tmp_path / "b.mkv") == ["text (title)"]


def test_a_missing_library_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    from polyclinic.errors import MissingDependency

    path = save_video(tmp_path / "a" / "a.mkv", VALUES[:3])
    save_video(tmp_path / "b" / "b.mkv", VALUES[:3])
    monkeypatch.setitem(sys.modules, "av", None)
    with pytest.raises(MissingDependency, match=r'pip install "polyclinic\[video\]"'):
        video.frame_count(path)
    assert any("PyAV" in finding.message for finding in check_folder(tmp_path).findings)
