"""The flag reference is what the flag table says."""

from moonlang.config import reference


def test_the_page_is_up_to_date():
    assert reference.FILE.read_text("utf-8") == reference.text(), "run `python -m moonlang.config.reference`"


def test_main_writes_the_page(tmp_path):
    assert reference.main([str(tmp_path / "deep" / "flags.md")]) == 0
    assert (tmp_path / "deep" / "flags.md").read_text("utf-8") == reference.text()
