"""Which remote a machine uses: environment over workspace over user."""

from __future__ import annotations

from pathlib import Path

import pytest

from pipeline.errors import ConfigError
from pipeline.remotes.settings import Policy, Settings, load


@pytest.fixture
def users(tmp_path: Path) -> Path:
    return tmp_path / "users.toml"


def settings(workspace: Path | None, users: Path, **environment: str) -> Settings:
    return load(workspace, {"TVMAKE_CONFIG": str(users), **environment})


def test_without_files_there_is_no_remote(tmp_path: Path, users: Path) -> None:
    assert settings(tmp_path, users) == Settings()
    assert not Settings().uses_remote


def test_what_stands_higher_wins_key_by_key(tmp_path: Path, users: Path) -> None:
    users.write_text('[remote]\nurl = "file:///users"\npolicy = "read-only"\nstall = 3\n')
    assert settings(None, users).url == "file:///users"
    (tmp_path / "tvmake.toml").write_text('[remote]\nurl = "file:///teams"\n')
    both = settings(tmp_path, users)
    assert (both.url, both.policy, both.stall, both.connect) == ("file:///teams", Policy.READ_ONLY, 3.0, 2.0)
    named = settings(tmp_path, users, TVMAKE_REMOTE="file:///mine", TVMAKE_REMOTE_POLICY="write-only")
    assert (named.url, named.policy) == ("file:///mine", Policy.WRITE_ONLY)
    assert not settings(tmp_path, users, TVMAKE_REMOTE="off").uses_remote
    assert not settings(tmp_path, users, TVMAKE_REMOTE_POLICY="off").uses_remote


def test_policies_say_what_is_done() -> None:
    told = {policy: (policy.reads, policy.writes) for policy in Policy}
    assert told == {
        Policy.READ_WRITE: (True, True),
        Policy.READ_ONLY: (True, False),
        Policy.WRITE_ONLY: (False, True),
        Policy.OFF: (False, False),
    }


def test_whom_to_trust_is_the_machines_to_say(tmp_path: Path, users: Path) -> None:
    users.write_text('[trust]\nkeys = ["ed25519:AAAA"]\nsign_with = "~/key.pem"\n')
    own = settings(tmp_path, users)
    assert own.signature_required
    assert own.trusted == ("ed25519:AAAA",)
    assert own.sign_with == Path("~/key.pem").expanduser()
    assert settings(tmp_path, users, TVMAKE_TRUST="ed25519:BBBB ed25519:CCCC").trusted[1:] == (
        "ed25519:BBBB",
        "ed25519:CCCC",
    )
    (tmp_path / "tvmake.toml").write_text("[trust]\nrequired = false\n")
    with pytest.raises(ConfigError, match="the machine's to say"):
        settings(tmp_path, users)


def test_who_signs_believes_only_what_is_signed(users: Path) -> None:
    assert settings(None, users, TVMAKE_SIGN_WITH="/key.pem").signature_required
    users.write_text("[trust]\nrequired = false\n")
    assert not settings(None, users, TVMAKE_SIGN_WITH="/key.pem").signature_required


def test_the_stores_bounds(users: Path) -> None:
    users.write_text('[store]\nsize = "1.5 GB"\nage = "60 days"\n')
    assert (settings(None, users).max_bytes, settings(None, users).max_age) == (1_500_000_000, 60 * 86400.0)
    users.write_text('[store]\nsize = "512 MiB"\nage = "12 h"\n')
    assert (settings(None, users).max_bytes, settings(None, users).max_age) == (512 << 20, 12 * 3600.0)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("[remote]\nurls = 1\n", "unknown"),
        ('[remote]\npolicy = "sometimes"\n', "policy"),
        ("[remote]\nconnect = 0\n", "connect"),
        ("[remote\n", "not TOML"),
        ('[store]\nsize = "large"\n', "size"),
        ('[store]\nage = "1.2.3 days"\n', "span"),
        ("[trust]\nrequired = true\n", "no key is trusted"),
        ("[cloud]\n", "unknown"),
    ],
)
def test_what_cannot_be_meant_is_told(users: Path, text: str, said: str) -> None:
    users.write_text(text)
    with pytest.raises(ConfigError, match=said):
        settings(None, users)


def test_a_policy_that_is_none_is_told(users: Path) -> None:
    with pytest.raises(ConfigError, match="TVMAKE_REMOTE_POLICY"):
        settings(None, users, TVMAKE_REMOTE_POLICY="maybe")


def test_secrets_are_not_shown(users: Path) -> None:
    assert "hush" not in repr(settings(None, users, TVMAKE_REMOTE="http://h", TVMAKE_REMOTE_TOKEN="hush"))


@pytest.mark.parametrize(
    "text",
    [
        "[remote]\nconnect = inf",
        "[remote]\nstall = 1e300",
        "[remote]\nconnect = nan",
        "[remote]\nstall = 0",
        f'[store]\nsize = "{"9" * 400}"',
        f'[store]\nage = "{"9" * 400} days"',
        '[store]\nsize = "."',
    ],
)
def test_figures_that_cannot_be_meant_are_told(users: Path, text: str) -> None:
    users.write_text(text)
    with pytest.raises(ConfigError) as told:
        settings(None, users)
    assert len(str(told.value)) < 200


def test_who_has_no_home_has_no_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nor may a workspace bring one along where the user's would be looked for relative to it."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("os.path.expanduser", lambda path: path)  # as it answers where there is no home
    for folder in ("~/.config/tvmake", "own/tvmake"):
        (tmp_path / folder).mkdir(parents=True)
        (tmp_path / folder / "tvmake.toml").write_text('[remote]\nurl = "file:///evil"\n')
    assert load(None, {}).url is None
    assert load(None, {"XDG_CONFIG_HOME": "own"}).url is None


def test_a_user_that_there_is_not_is_no_crash(users: Path) -> None:
    users.write_text('[trust]\nsign_with = "~nobody-of-this-name/key.pem"\n')
    assert settings(None, users).sign_with is not None
    assert load(None, {"TVMAKE_CONFIG": "~nobody-of-this-name/tvmake.toml"}).url is None
