"""``torchrun`` that ends with the process that started it."""

from __future__ import annotations

import os

from tasks.train.parent import die_with_parent, parent_of_others

if __name__ == "__main__":
    die_with_parent()
    os.environ.update(parent_of_others())
    from torch.distributed.run import main

    main()
