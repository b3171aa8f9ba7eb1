"""A table whose URLs have passwords and signatures: the files come, and nothing here tells them."""

from pathlib import Path

import pytest
from project import Project, page_text
from servers import guarded_web_server

pytestmark = pytest.mark.slow
WORD, SIGNATURE = "hunter-two", "5ecre7519na7ure"


def test_secrets_reach_no_record_listing_log_or_shell_line(tmp_path: Path) -> None:
    project = Project(tmp_path / "project")
    (project.root / "sources").rename(tmp_path / "elsewhere")
    signed = f"X-Amz-Credential=c%2Fd&X-Amz-Date=1&X-Amz-Signature={SIGNATURE}"
    with guarded_web_server(tmp_path / "elsewhere", f"me:{WORD}", SIGNATURE) as place:
        rows = [
            f"http://me:{WORD}@{place}/part-0.json.gz",
            f"http://{place}/part-1.json.gz?{signed}",
            f"http://{place}/gone/part-2.json.gz",  # which the mirror has
        ]
        table = project.root / "table.tsv"
        table.write_text("\n".join(["url\tbytes\tsha256\tlicence", *rows, ""]))
        mirrors = [f"http://{place}/gone/=http://me:{WORD}@{place}/"]
        project.change("config/data/small.yaml", sources={"table": "table.tsv", "mirrors": mirrors})
        targets = ("data/small/documents/000.tsv", "data/small/documents/001.tsv")
        done = project.run(*targets, "-p")
        shown = project.full_log()
        assert done.ran["download"] == 3 and f"part-1=http://{place}/part-1.json.gz" in shown
        assert [row.split("\t")[0] for row in table.read_text().splitlines()[1:]] == rows
        assert "Nothing to be done" in project.run(*targets).output
        # A signature that was rotated is no reason to do anything again.
        table.write_text(table.read_text().replace(SIGNATURE, f"{SIGNATURE}-rotated"))
        assert "Nothing to be done" in project.run(*targets).output
        # A page tells where each file is from, and none of the words that fetch it.
        project.run("report/small.html", "report/index.html")
        page = page_text(project.root / "report/small.html")
        assert f"http://{place}/part-1.json.gz" in page
        for text in (page, page_text(project.root / "report/index.html")):
            assert WORD not in text and SIGNATURE not in text
    second = project.olmo("store", "push", str(tmp_path / "second"))
    assert second.status == 0, second.output
    for text in (done.output, done.logs, shown, second.output):
        assert WORD not in text and SIGNATURE not in text
    own = (table, project.root / "config/data/small.yaml")
    for path in (p for p in tmp_path.rglob("*") if p.is_file() and p not in own):
        content = path.read_bytes()
        assert WORD.encode() not in content and SIGNATURE.encode() not in content, path
