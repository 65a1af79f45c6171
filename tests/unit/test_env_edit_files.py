"""The file system's side of the edit: crashes, modes, owners, links, mounts, full disks. Nothing is ever half done."""

import os
import signal
import stat
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from pipeline.cutover.envwrite import EnvEdit, apply_edit, check_editable, copy_path
from pipeline.errors import RefusedError
from tests.support import ROOT, clean_environment

BEFORE, AFTER = b"# old\r\nSECRET=c4nary-old\n", b"# old\r\nSECRET=c4nary-new\n"
STAMP = "20261123T061500Z"
NOBODY = 65534
needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="changing owners takes root")
CHILD = """
import sys
from pathlib import Path
from pipeline.cutover.envwrite import EnvEdit, apply_edit, check_editable
from pipeline.errors import PipelineError
path, copy = Path(sys.argv[1]), Path(sys.argv[2])
edit = EnvEdit(path=path, shown=path, before=BEFORE, after=AFTER, changes=())
try:
    if len(sys.argv) > 3:
        check_editable(path)
    apply_edit(edit, copy)
except PipelineError as error:
    print(type(error).__name__, "|", error.fact, "|", error.hint)
    sys.exit(error.exit_code)
""".replace("BEFORE", repr(BEFORE)).replace("AFTER", repr(AFTER))


@pytest.fixture
def env(tmp_path: Path) -> Path:
    path = tmp_path / "app" / ".env"
    path.parent.mkdir()
    path.write_bytes(BEFORE)
    path.chmod(0o640)
    return path


@pytest.fixture
def edit(env: Path) -> EnvEdit:
    return EnvEdit(path=env, shown=env, before=BEFORE, after=AFTER, changes=())


def begin(env: Path, failpoint: str, before: str = "", check: bool = False) -> "subprocess.Popen[str]":
    """Start the edit in a process of its own; ``before`` is a shell's command in a mount namespace of its own."""
    variables = clean_environment() | {"PIPELINE_TESTING": "1", "PIPELINE_FAILPOINT": failpoint}
    argv = [sys.executable, "-c", CHILD, str(env), str(copy_path(env, STAMP)), *(["check"] if check else [])]
    if before:
        argv = ["unshare", "-m", "sh", "-ec", f'{before}\nexec "$@"', "sh", *argv]
    pipe = subprocess.PIPE
    return subprocess.Popen(argv, env=variables, cwd=ROOT, stdout=pipe, stderr=pipe, text=True)


def end(process: "subprocess.Popen[str]") -> tuple[int, str]:
    out, err = process.communicate(timeout=60)
    assert "c4nary" not in out + err and not err
    return process.returncode, out


def apply_in_child(env: Path, *, failpoint: str = "", before: str = "", check: bool = False) -> tuple[int, str]:
    return end(begin(env, failpoint, before, check))


def files(env: Path) -> set[str]:
    return {path.name for path in env.parent.iterdir()}


def test_edit_writes_the_file_and_a_dated_copy_once(env: Path, edit: EnvEdit) -> None:
    copy = copy_path(env, STAMP)
    assert copy == env.with_name(".env.before-cutover-20261123T061500Z")
    assert copy_path(env, STAMP, "rollback").name == ".env.before-rollback-20261123T061500Z"
    apply_edit(edit, copy)
    assert (env.read_bytes(), copy.read_bytes()) == (AFTER, BEFORE)
    assert stat.S_IMODE(env.stat().st_mode) == stat.S_IMODE(copy.stat().st_mode) == 0o640
    made = (env.stat(), copy.stat())
    apply_edit(edit, copy)
    assert (env.stat(), copy.stat()) == made
    assert files(env) == {env.name, copy.name}


@pytest.mark.parametrize("mode", [0o600, 0o644, 0o440])
@needs_root
def test_mode_owner_and_attributes_are_kept(mode: int, env: Path, edit: EnvEdit) -> None:
    os.chown(env, 4321, 1234)
    env.chmod(mode)
    os.setxattr(env, "user.note", b"kept")
    copy = copy_path(env, STAMP)
    old_mask = os.umask(0)
    try:
        apply_edit(edit, copy)
    finally:
        os.umask(old_mask)
    for path in (env, copy):
        info = path.stat()
        assert (info.st_uid, info.st_gid, stat.S_IMODE(info.st_mode)) == (4321, 1234, mode)
        assert os.getxattr(path, "user.note") == b"kept"


@pytest.mark.parametrize(("failpoint", "now"), [("in_env_edit", BEFORE), ("after_env_edit", AFTER)])
def test_kill_leaves_the_old_or_the_new_file_whole(failpoint: str, now: bytes, env: Path) -> None:
    env.chmod(0o600)
    assert apply_in_child(env, failpoint=failpoint)[0] == -signal.SIGKILL
    copy = copy_path(env, STAMP)
    assert (env.read_bytes(), copy.read_bytes()) == (now, BEFORE)
    assert all(stat.S_IMODE(path.stat().st_mode) == 0o600 for path in env.parent.iterdir())
    assert len(files(env)) == (3 if now == BEFORE else 2)
    assert apply_in_child(env) == (0, "")
    assert env.read_bytes() == AFTER
    assert files(env) == {env.name, copy.name}


def test_error_on_the_way_leaves_nothing_behind(env: Path) -> None:
    code, _ = apply_in_child(env, failpoint="in_env_edit:raise")
    assert code == 5
    assert env.read_bytes() == BEFORE
    assert files(env) == {env.name, copy_path(env, STAMP).name}


def test_edit_of_the_last_moment_is_not_lost(env: Path) -> None:
    process = begin(env, "in_env_edit:stop")
    _, status = os.waitpid(process.pid, os.WUNTRACED)
    assert os.WIFSTOPPED(status)
    env.write_bytes(b"SECRET=mine\n")
    os.kill(process.pid, signal.SIGCONT)
    code, out = end(process)
    assert code == 4 and "edited since this was planned" in out
    assert env.read_bytes() == b"SECRET=mine\n"
    assert files(env) == {env.name, copy_path(env, STAMP).name}


def test_new_file_is_nobody_elses_while_it_is_made(env: Path, edit: EnvEdit) -> None:
    env.chmod(0o644)
    seen: list[set[tuple[str, int]]] = []

    def before_the_mode_is_set(_frame: object, event: str, function: object) -> None:
        if event == "c_call" and function is os.fchmod:
            seen.append({(path.suffix, stat.S_IMODE(path.stat().st_mode)) for path in env.parent.iterdir()})

    old_mask = os.umask(0)
    sys.setprofile(before_the_mode_is_set)
    try:
        apply_edit(edit, None)
    finally:
        sys.setprofile(None)
        os.umask(old_mask)
    assert seen == [{("", 0o644), (".pipeline-edit", 0o600)}]
    assert stat.S_IMODE(env.stat().st_mode) == 0o644


def test_every_rename_is_between_two_syncs(env: Path, edit: EnvEdit) -> None:
    """The file's bytes are on the disk before its name is, and the name before anything else goes on."""
    called: list[str] = []

    def note(_frame: object, event: str, function: object) -> None:
        if event == "c_call" and function in (os.fsync, os.replace):
            called.append("sync" if function is os.fsync else "rename")

    sys.setprofile(note)
    try:
        apply_edit(edit, copy_path(env, STAMP))
    finally:
        sys.setprofile(None)
    assert called == ["sync", "rename", "sync"] * 2


def test_leftover_of_a_killed_run_is_replaced_not_followed(env: Path, edit: EnvEdit, tmp_path: Path) -> None:
    elsewhere = tmp_path / "elsewhere"
    elsewhere.write_bytes(b"mine")
    assert apply_in_child(env, failpoint="in_env_edit")[0] == -signal.SIGKILL
    (spare,) = (path for path in env.parent.iterdir() if path.name.endswith("pipeline-edit"))
    spare.unlink()
    spare.symlink_to(elsewhere)
    apply_edit(edit, copy_path(env, STAMP))
    assert env.read_bytes() == AFTER and not env.is_symlink()
    assert elsewhere.read_bytes() == b"mine"


def test_link_stays_a_link(env: Path, tmp_path: Path) -> None:
    link = tmp_path / "link.env"
    link.symlink_to(env)
    check_editable(link)
    assert copy_path(link, STAMP).parent == env.parent
    apply_edit(EnvEdit(path=env, shown=link, before=BEFORE, after=AFTER, changes=()), copy_path(link, STAMP))
    assert link.is_symlink() and link.read_bytes() == AFTER


def test_file_that_somebody_edited_is_left_alone(env: Path, edit: EnvEdit) -> None:
    env.write_bytes(BEFORE + b"X=1\n")
    with pytest.raises(RefusedError, match="edited since this was planned"):
        apply_edit(edit, copy_path(env, STAMP))
    assert env.read_bytes() == BEFORE + b"X=1\n"
    assert files(env) == {env.name}


def test_copy_of_another_state_is_never_overwritten(env: Path, edit: EnvEdit) -> None:
    copy = copy_path(env, STAMP)
    copy.write_bytes(b"first\n")
    with pytest.raises(RefusedError, match="edited since its copy"):
        apply_edit(edit, copy)
    assert (env.read_bytes(), copy.read_bytes()) == (BEFORE, b"first\n")


def test_edit_without_a_copy_makes_none(env: Path, edit: EnvEdit) -> None:
    apply_edit(edit, None)
    assert env.read_bytes() == AFTER and files(env) == {env.name}


def test_check_writes_nothing(env: Path) -> None:
    before = (env.stat(), env.parent.stat())
    check_editable(env)
    assert (env.stat(), env.parent.stat()) == before


@pytest.mark.parametrize(
    ("kind", "fact"), [("none", "cannot be read"), ("folder", "not a file"), ("loop", "cannot"), ("hard", "2 names")]
)
def test_what_is_no_plain_file_is_refused(kind: str, fact: str, env: Path) -> None:
    if kind == "hard":
        env.with_name("other").hardlink_to(env)
    else:
        env.unlink()
    if kind == "folder":
        env.mkdir()
    if kind == "loop":
        env.symlink_to(env)
    with pytest.raises(RefusedError, match=fact) as raised:
        check_editable(env)
    assert raised.value.hint


@pytest.fixture
def as_nobody(env: Path) -> Iterator[None]:
    """Be a user without rights, whose file and folder these are."""
    if os.geteuid() != 0:
        pytest.skip("being somebody else takes root")
    modes = {folder: stat.S_IMODE(folder.stat().st_mode) for folder in env.parents if folder.stat().st_mode & 0o1 == 0}
    for folder, mode in modes.items():
        folder.chmod(mode | 0o111)
    os.chown(env, NOBODY, NOBODY)
    os.chown(env.parent, NOBODY, NOBODY)
    groups = os.getgroups()
    os.setgroups([])
    os.setegid(NOBODY)
    os.seteuid(NOBODY)
    yield
    os.seteuid(0)
    os.setegid(0)
    os.setgroups(groups)
    for folder, mode in modes.items():
        folder.chmod(mode)


@pytest.mark.parametrize(
    ("uid", "gid", "mode", "folder", "fact"),
    [
        (NOBODY, NOBODY, 0o600, 0o555, "not writable"),
        (0, NOBODY, 0o644, 0o777, "another user"),
        (NOBODY, 0, 0o644, 0o777, "group that this user is not in"),
        (NOBODY, NOBODY, 0o000, 0o777, "Permission denied"),
    ],
)
def test_user_without_the_rights_is_told_which(
    uid: int, gid: int, mode: int, folder: int, fact: str, env: Path, edit: EnvEdit, as_nobody: None
) -> None:
    check_editable(env)
    os.seteuid(0)
    os.chown(env, uid, gid)
    env.chmod(mode)
    env.parent.chmod(folder)
    os.seteuid(NOBODY)
    with pytest.raises(RefusedError, match=fact) as raised:
        check_editable(env)
    assert raised.value.hint
    with pytest.raises(RefusedError):
        apply_edit(edit, copy_path(env, STAMP))
    os.seteuid(0)
    assert env.read_bytes() == BEFORE and files(env) == {env.name}


def can_mount() -> bool:
    try:
        return subprocess.run(["unshare", "-m", "true"], capture_output=True, check=False).returncode == 0
    except OSError:
        return False


@pytest.mark.skipif(not can_mount(), reason="mounting takes root and unshare")
@pytest.mark.parametrize("check", [True, False])
@pytest.mark.parametrize(
    ("mounts", "fact", "hint"),
    [
        ('mount --bind "{host}" "{env}"', "busy", "run this where the file really is"),
        ('mount --bind "{dir}" "{dir}"\nmount -o remount,ro,bind "{dir}"', "Read-only", "mounted read-only"),
    ],
)
def test_mounted_file_is_refused_and_untouched(mounts: str, fact: str, hint: str, check: bool, env: Path) -> None:
    host = env.parent.parent / "host.env"
    host.write_bytes(BEFORE)
    code, out = apply_in_child(env, before=mounts.format(host=host, env=env, dir=env.parent), check=check)
    assert code == 4
    assert fact in out and hint in out and str(env) in out
    assert env.read_bytes() == host.read_bytes() == BEFORE and files(env) == {env.name}


@pytest.mark.skipif(not can_mount(), reason="mounting takes root and unshare")
def test_full_disk_leaves_the_file_whole(env: Path) -> None:
    """The disk is full after the old file; what it then holds is copied out by the shell."""
    script = (
        'mount -t tmpfs -o size=64k none "{dir}"\ncp "{keep}" "{env}"\n'
        'dd if=/dev/zero of="{dir}/ballast" bs=4k 2>/dev/null || true\n'
        '"$@" || code=$?\ncp "{env}" "{keep}.now"; ls -A "{dir}" > "{keep}.list"; exit $code'
    )
    keep = env.parent.parent / "keep.env"
    keep.write_bytes(BEFORE)
    code, out = apply_in_child(env, before=script.format(dir=env.parent, env=env, keep=keep))
    assert code == 4
    assert "No space left" in out and "make room" in out
    assert Path(f"{keep}.now").read_bytes() == BEFORE
    assert Path(f"{keep}.list").read_text().split() == [".env", "ballast"]


@pytest.mark.parametrize("place", ["file", "folder"])
def test_protected_file_is_refused_before_anything(place: str, env: Path, edit: EnvEdit) -> None:
    protected = str(env if place == "file" else env.parent)
    try:
        made = subprocess.run(["chattr", "+i", protected], capture_output=True, check=False).returncode == 0
    except OSError:
        made = False
    if not made:
        pytest.skip("chattr does not work here")
    try:
        with pytest.raises(RefusedError, match="protected") as raised:
            check_editable(env)
        assert raised.value.hint == f"chattr -ia {protected}"
        with pytest.raises(RefusedError):
            apply_edit(edit, copy_path(env, STAMP))
    finally:
        subprocess.run(["chattr", "-i", protected], check=True)
    assert env.read_bytes() == BEFORE and files(env) == {env.name}
