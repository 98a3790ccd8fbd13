"""One of two processes of test_lite_training: trains with gloo, evaluates, and saves."""

import json
import sys
from pathlib import Path

from small_lite import Samples, logged, make_trainer

folder = Path(sys.argv[1])
trainer = make_trainer(folder, per_device_train_batch_size=2, max_steps=2, ddp_backend="gloo")
assert trainer.args.world_size == 2
trainer.train()
trainer.save_model()
trainer.eval_dataset = Samples(5)
found = trainer.evaluate()
if trainer.is_world_process_zero():
    (folder / "report.json").write_text(json.dumps({"losses": logged(trainer), **found}))
