"""How long a certificate of a run with many sources takes, and how large it is.

uv run python bench/certificate.py [--sources 5000]
"""

import argparse
import os
import sys
import tempfile
import time
from pathlib import Path

import yaml

sys.path[:0] = [str(Path(__file__).parents[1] / "tests" / name) for name in ("", "browser")]


def main() -> None:
    import large_run
    from certified import write_key

    from olmo.certificate.make import make
    from olmo.certificate.signature import KEY_ENV
    from olmo.certificate.verify import verify

    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--sources", type=int, default=5000)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        key = write_key(Path(folder, "key.pem"))
        os.environ[KEY_ENV] = str(key)
        with large_run.project(Path(folder, "project"), 100, options.sources):
            path = Path("config/config.yaml")
            config = yaml.safe_load(path.read_text()) | {"certificate": {"licence": "Apache-2.0"}}
            path.write_text(yaml.safe_dump(config))
            certificate, checkpoint = Path("certificate/large"), Path("checkpoints/large/final")
            start = time.perf_counter()
            make("large")
            made = time.perf_counter()
            verify(certificate, public_key=key.with_suffix(".pub"), checkpoint=checkpoint)
            print(f"made in {made - start:.1f} s, verified in {time.perf_counter() - made:.2f} s")
            for one in sorted(certificate.iterdir()):
                print(f"{one.name}: {one.stat().st_size:,} bytes")


if __name__ == "__main__":
    main()
