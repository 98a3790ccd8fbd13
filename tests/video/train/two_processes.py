"""One of two processes of ``test_two_processes_are_one``: trains once for each of the options, and writes what the
first one logged."""

import json
import sys
from pathlib import Path

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parents[1] / "dropin")]

from small_training import PARTS, logged, make_trainer  # noqa: E402


def main(folder: str, options: str) -> None:
    for number, one in enumerate(json.loads(options)):
        trainer = make_trainer(Path(folder) / str(number), **one)
        trainer.train()
        trainer.save_model()
        if trainer.is_world_process_zero():
            (Path(folder) / f"log{number}.json").write_text(json.dumps(logged(trainer, *PARTS)))


if __name__ == "__main__":
    main(*sys.argv[1:])
