"""`doit cache`: what is pushed, pulled, carried in a file and kept, by hand."""

from __future__ import annotations

import json
import os
import re
import shutil
from pathlib import Path

from tests.sharing.machines import Machine, Machines


def test_what_is_pushed_can_be_pulled(
    folder: dict[str, str], built: Machine, machines: Machines, tmp_path: Path
) -> None:
    one, other, watcher = built, machines(folder), machines(folder)
    assert other.cache("lookup").code == 1
    pushed = one.cache("push", **folder).good()
    assert re.search(r"native:net: (\d+) of \1 entries sent", pushed.out)
    assert "0 of 0 entries sent" in one.cache("push", **folder).good().out, "it is there already"
    assert re.search(r"native:net: (\d+) of \1 entries on the remote", watcher.cache("lookup").good().out)
    assert len(list((watcher.workspace.cache / "ac").glob("*/*"))) <= 3, "to look is not to fetch"
    other.cache("pull").good()
    assert not other.build(forbid_tvm=True, TVMAKE_REMOTE="off").good().ran
    assert other.artifact() == one.artifact()
    victim = next(path for path in (tmp_path / "shared" / "cas").iterdir() if b"\x7fELF" in path.read_bytes()[:4])
    victim.unlink()
    lacking = one.cache("lookup", **folder)
    assert lacking.code == 1
    assert "missing: codegen of native:" in lacking.out or "missing: link of native:net" in lacking.out
    one.cache("push", **folder).good()
    assert one.cache("lookup", **folder).code == 0


def test_what_a_verb_cannot_use_is_refused(built: Machine) -> None:
    assert "usage" in json.loads(built.cache("stats", "--json").good().out)
    for arguments, said in (
        (("verify", "--json"), "`doit cache verify` takes no --json\n  → that is for: stats, lookup, push, pull\n"),
        (("stats", "-n"), "`doit cache stats` takes no -n\n  → that is for: gc\n"),
        (("gc", "-t", "native", "--size", "1GB"), "`doit cache gc` takes no -t\n"),
        (("verify", "net"), "`doit cache verify` has no use for net\n"),
        (("pin",), "`doit cache pin` wants a name for the pin\n"),
    ):
        done = built.cache(*arguments)
        assert (done.code, done.out) == (2, ""), arguments
        assert said in done.err


def test_what_nobody_takes_is_not_pushed(built: Machine) -> None:
    done = built.cache("push", TVMAKE_REMOTE="http://127.0.0.1:9/")
    assert done.code == 1, done.out
    assert re.search(r"native:net: 0 of [1-9]\d* entries sent", done.out)
    assert len(re.findall(r"entries were not sent", done.err)) <= 1


def test_a_target_at_fault_keeps_no_other_from_being_shared(
    folder: dict[str, str], built: Machine, machines: Machines
) -> None:
    one, other = built, machines(folder)
    for machine in (one, other):
        machine.workspace.write("targets/broken.toml", "target = {")
    for machine, verb in ((one, "push"), (other, "pull"), (other, "lookup")):
        done = machine.cache(verb, **folder)
        assert done.code == 1, done.err
        assert re.search(r"native:net: ([1-9]\d*) of \1 entries", done.out), done.out
        assert re.search(r"broken:net: .*is not TOML", done.out), done.out


def test_a_file_carries_everything(built: Machine, machines: Machines, tmp_path: Path) -> None:
    one, other, torn = built, machines({}), machines({})
    file = tmp_path / "net.tar"
    one.cache("export", str(file)).good()
    other.cache("import", str(file)).good()
    assert not other.build(forbid_tvm=True).good().ran
    assert other.artifact() == one.artifact()
    file.write_bytes(file.read_bytes()[:-5000])
    assert torn.cache("import", str(file)).code == 1
    torn.build().good()
    assert torn.artifact() == one.artifact()
    assert torn.cache("import", str(tmp_path / "absent.tar")).code == 2
    (tmp_path / "text.tar").write_text("hello")
    refused = torn.cache("import", str(tmp_path / "text.tar"))
    assert refused.code == 2
    assert "Traceback" not in refused.err


def test_a_file_is_taken_from_trusted_hands_only(built: Machine, machines: Machines, tmp_path: Path) -> None:
    key = tmp_path / "key.pem"
    public = machines({}).cache("key", str(key)).good().out.strip()
    one, other = built, machines({"TVMAKE_TRUST": public})
    file = tmp_path / "net.tar"
    one.cache("export", str(file)).good()
    assert "not signed" in other.cache("import", str(file)).err
    one.cache("export", str(file), TVMAKE_SIGN_WITH=str(key)).good()
    other.cache("import", str(file)).good()
    file.write_bytes(file.read_bytes().replace(b"codegen", b"codegem", 1))
    assert other.cache("import", str(file)).code == 2


def test_what_is_pinned_stays(built: Machine) -> None:
    one = built
    one.cache("pin", "release-1").good()
    assert one.cache("gc", "--size", "0").code == 1
    for path in (one.workspace.cache / "ac").rglob("*"):
        os.utime(path, (0, 0))
    one.cache("gc", "--size", "0")
    shutil.rmtree(one.workspace.folder / "artifacts")
    (one.workspace.folder / ".doit.db").unlink()
    assert not one.build(forbid_tvm=True).good().ran
    assert one.cache("unpin", "release-2").code == 2
    one.cache("unpin", "release-1").good()


def test_the_store_tells_of_itself(sender: Machine, machines: Machines, folder: dict[str, str]) -> None:
    other = machines(folder)
    other.build().good()
    told = other.cache("stats").good()
    assert re.search(r"codegen .* 3 ", told.out), told.out
    assert "saved" in told.out
    assert '"remote_hits"' in other.cache("stats", "--json").good().out
    assert other.cache("verify").good().err.endswith("all as they should be\n")
    blob = next(path for path in (other.workspace.cache / "cas").rglob("*") if path.is_file())
    blob.chmod(0o644)
    blob.write_bytes(b"other bytes")
    assert other.cache("verify").code == 1
    assert "wants to know" in other.cache().err
    assert other.cache("shrink").code == 2
    assert other.cache("gc").code == 2, "nothing says how much to keep"
    assert "would remove" in other.cache("gc", "--size", "1MB", "-n").err
