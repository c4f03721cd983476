"""What the tests hold every call in the package to: its annotations, where int passes for float."""

from beartype import BeartypeConf, beartype

check = beartype(conf=BeartypeConf(is_pep484_tower=True))
