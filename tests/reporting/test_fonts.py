import pytest
from PIL import ImageFont

from wsss_hf.reporting import fonts

OWN = ImageFont.load_default(18).getname()


@pytest.fixture
def asked(monkeypatch):
    """The fonts of the system that are asked for; there is none."""
    names, truetype = [], ImageFont.truetype

    def none(font, *arguments, **options):
        if isinstance(font, str):
            names.append(font)
            raise OSError("cannot open resource")
        return truetype(font, *arguments, **options)

    fonts._system_font.cache_clear()
    with monkeypatch.context() as patch:
        patch.setattr(ImageFont, "truetype", none)
        yield names
    fonts._system_font.cache_clear()


def test_ascii_looks_the_same_on_every_machine(asked):
    assert fonts.font_for("cat, dog (a.jpg)", 18).getname() == OWN and not asked


def test_a_machine_without_fonts_still_draws(asked):
    assert fonts.font_for("Größe", 18).getname() == OWN and len(asked) > 1


def test_other_letters_are_drawn_with_a_font_of_the_system():
    font = fonts.font_for("Größe", 18)
    if font.getname() == OWN:
        pytest.skip("no such font here")
    assert bytes(font.getmask("ö")) != bytes(font.getmask("ß"))  # which are the same box in Pillow's own
