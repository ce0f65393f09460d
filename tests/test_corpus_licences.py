"""One licence has many names, and a list of licences is as permissive as its strictest."""

import pytest

from megatron_ra3.corpus.licences import PERMISSIVE, allowed, normalise, spdx_header


@pytest.mark.parametrize(
    ("declared", "ids"),
    [
        ("MIT", ("mit",)),
        ("mit", ("mit",)),
        ("The MIT License", ("mit",)),
        ("Apache-2.0,MIT", ("apache-2.0", "mit")),
        ("['MIT']", ("mit",)),
        ('["Apache-2.0", "BSD-3-Clause"]', ("apache-2.0", "bsd-3-clause")),
        ("Apache License 2.0", ("apache-2.0",)),
        ("Apache License, Version 2.0", ("apache-2.0",)),
        ("License :: OSI Approved :: Apache Software License", ("apache-2.0",)),
        ("License :: OSI Approved :: MIT License", ("mit",)),
        ("License :: OSI Approved :: GNU General Public License v3 (GPLv3)", ("gpl-3.0",)),
        ("License :: OSI Approved :: Python Software Foundation License", ("psf-2.0",)),
        ('BSD 3-Clause "New" or "Revised" License', ("bsd-3-clause",)),
        ("MIT OR (GPL-2.0-only WITH Classpath-exception-2.0)", ("gpl-2.0", "mit")),
        ("GPL-2.0-or-later", ("gpl-2.0-or-later",)),
        ("New BSD License", ("bsd-3-clause",)),
        ("Mozilla Public License 2.0 (MPL 2.0)", ("mpl-2.0",)),
        ("CC0 1.0 Universal", ("cc0-1.0",)),
        ("The Unlicense", ("unlicense",)),
        ("", ()),
        ("unknown", ()),
        ("NOASSERTION", ()),
        ("no license", ()),
        ("[]", ()),
        ("My Own Terms", ("my-own-terms",)),
    ],
)
def test_normalise(declared, ids):
    assert normalise(declared) == ids


def test_every_identifier_of_the_allow_list_is_its_own_normal_form():
    assert {name: normalise(name) for name in PERMISSIVE} == {name: (name,) for name in PERMISSIVE}
    assert {name: normalise(name.upper()) for name in PERMISSIVE} == {name: (name,) for name in PERMISSIVE}
    assert not {"gpl-2.0", "gpl-3.0", "agpl-3.0", "lgpl-3.0", "mpl-2.0", "cc-by-nc-4.0"} & PERMISSIVE


def test_all_licences_must_be_allowed():
    assert allowed(("apache-2.0", "mit"), PERMISSIVE, unknown=False)
    assert not allowed(("gpl-3.0", "mit"), PERMISSIVE, unknown=True)
    assert allowed((), PERMISSIVE, unknown=True)
    assert not allowed((), PERMISSIVE, unknown=False)


def test_spdx_header():
    assert spdx_header("#!/bin/x\n# SPDX-License-Identifier: Apache-2.0 OR MIT\nimport os\n") == "Apache-2.0 OR MIT"
    assert spdx_header("/* SPDX-License-Identifier: BSD-3-Clause */\n") == "BSD-3-Clause"
    assert spdx_header("import os\n") == ""
    assert spdx_header("\n" * 100 + "# SPDX-License-Identifier: MIT\n") == ""
