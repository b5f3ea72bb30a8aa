"""Data docs as one page: what GX says is kept, what refers or acts is not, whatever the data hold."""

from __future__ import annotations

from pathlib import Path

import pytest

from tasks.data.docs import sections_of, write_docs
from tasks.spec.errors import DrydockError

pytestmark = pytest.mark.timeout(30)
PAGE = """\
<!DOCTYPE html><html><head><link rel="stylesheet" href="https://cdn.example/x.css">
<script>var a = "</p>";</script></head>
<body><nav><a href="../index.html"><img src="https://cdn.example/logo.png"></a> Home</nav>
<div class="row"><div id="s1" class="ge-section container-fluid" style="background: url(//cdn.example/a.png)">
<h5>width</h5><script src="https://cdn.example/vega.js"></script><button>Copy</button>
<p><a data-toggle="collapse" href="#more">Show more info...</a></p>
<table onclick="go()"><tr><td colspan="2"><i class="fas fa-times text-danger"></i> values must be &lt; 3 &amp; not
 <a href="https://cdn.example/doc">null</a>.<br/>5 off, such as &lt;script&gt;alert(1)&lt;/script&gt;</td></tr></table>
<p>unclosed <b>bold</div></div><footer>https://greatexpectations.example</footer></body></html>
"""


def test_what_is_said_is_kept_and_what_refers_or_acts_is_not():
    found = sections_of(PAGE)
    for kept in ("<h5>width</h5>", '<td colspan="2">', "✘", "&lt; 3 &amp; not", "null", "<br>", "<b>bold</b>"):
        assert kept in found
    assert "such as &lt;script&gt;alert(1)&lt;/script&gt;" in found
    for gone in ("http", "src", "href", "style", "<script", "onclick", "Copy", "Home", "Show more", "cdn.example"):
        assert gone not in found, gone
    assert found.count("<") == found.count(">")


def test_a_suite_without_a_page_is_a_fault_and_leaves_nothing(tmp_path: Path):
    with pytest.raises(DrydockError, match=r"no page of suite Generated\.raw"):
        write_docs(tmp_path / "site", {"Generated.raw": {"results": []}}, tmp_path / "docs")
    assert not (tmp_path / "docs").exists()
