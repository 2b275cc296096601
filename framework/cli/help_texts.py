"""What `--help` says: for each verb, examples that can be typed as they stand."""

HELP = """\
Named parts, composed into experiments, trained on PyTorch.

usage: framework VERB ...

  train       compose an experiment and train it
  resume      go on with a run that was cut off
  plan        the same, shown instead of trained
  check       the same, tried in seconds: steps, saving, resuming, learning
  find        a learning rate or a batch size, by trying them out
  eval        measure a trained run on a split of its data
  predict     run a trained model on a file
  list        the kinds of parts, or the parts of one
  show        a part: its settings, defaults, source
  trust       let list, show and TAB run the plugins of this folder
  board       TensorBoard on the runs
  completion  a script for TAB

  framework train model=mlp optimizer=sgd optimizer.lr=0.1
  framework eval runs/default/NAME

`framework VERB --help` shows each with examples. Exit status: 0; 2 for a
command, setting, part or data that cannot work; 1 for another error while a
run trains, in a part of yours or in the program (the message says where,
--traceback shows the calls); 130 or 143 when stopped by a signal."""

TRAIN = """\
examples:
  framework train                                   digits, an MLP: seconds
  framework train model.width=256 model.depth=3 activation=gelu
  framework train optimizer=sgd optimizer.lr=0.1 scheduler=one_cycle
  framework train +callbacks=early_stop callbacks.early_stop.patience=5
  framework train ~callbacks=progress               one part of a list less
  framework train model.activation=elu model.activation.alpha=0.5
  framework train experiment=fashion_mnist_cnn      a file of conf/experiment
  framework train -m optimizer.lr=1e-4,1e-3 'seed=range(3)'
                                                    every combination in turn
  framework train -m 'seed=range(9)' resume=auto    those that are missing
  framework train --repeat 5                        five seeds: mean and error
  framework train --folds 5                         cross-validation
  framework train --plugins mine.py activation=mine parts of your own
  framework train --without-plugin NAME             but for an installed plugin

Runs the plugins that conf/config.yaml and the experiment name: use a folder
from somebody else only if you trust it.
`framework list` names the parts, `framework show optimizer/sgd` the settings
of one. Settings of Hydra itself go by hydra.KEY=VALUE."""

RESUME = """\
examples:
  framework resume runs/default/first
  framework resume runs/default/first trainer.max_epochs=60
  framework resume runs/default/first/checkpoints/step-00000040
  framework train run.name=first resume=auto     the same command goes on
What the run would have come to, it comes to, bit for bit; settings that
would change that need --inexact. A run goes on from its newest checkpoint, or
from the one that is given: later ones are then kept as step-....aside, and
what was logged after it is dropped."""

PLAN = """\
examples:
  framework plan experiment=fashion_mnist_cnn
  framework plan model=cnn data=fashion_mnist --json
  framework plan -m optimizer.lr=1e-3,1e-2 model.width=32,64
Prints layers with shapes, parameters and FLOPs, steps, the schedule as a
curve, memory; trains nothing. Builds the experiment as `train` does, and so
runs the plugins that conf/config.yaml and the experiment name."""

CHECK = """\
examples:
  framework check
  framework check experiment=fashion_mnist_cnn
Takes two steps and validates; saves after the first, resumes, and compares
every weight; learns one batch by heart. Keeps nothing. Ends with status 0 when
all of it went well. Runs the plugins that conf/config.yaml and the experiment
name."""

FIND = """\
examples:
  framework find lr                                 digits, an MLP
  framework find lr experiment=fashion_mnist_cnn optimizer=sgd
  framework find batch_size experiment=fashion_mnist_cnn
lr raises the learning rate with each of 100 steps, and shows where the loss
falls; batch_size doubles it until memory is full or doubling is no gain. Both
run the plugins that conf/config.yaml and the experiment name."""

EVAL = """\
examples:
  framework eval runs/default/first
  framework eval runs/default/first --split val --checkpoint last --json"""

PREDICT = """\
examples:
  framework predict runs/default/first --input new.npz --output labels.csv
  framework predict runs/table/first --input new.csv --output -
  framework predict runs/lm_bpe/first --prompt "def " --length 300
The input is read as the run's data set reads its own files."""

LIST = """\
examples:
  framework list               the kinds, with how many parts each has
  framework list optimizer     the parts of a kind
  framework list --json        everything, for programs
Plugins that conf/config.yaml names are loaded if the folder is trusted (see
`framework trust --help`), those given with --plugins always."""

SHOW = """\
examples:
  framework show optimizer/adamw
  framework show gelu --json
Plugins are loaded as by `framework list`."""

TRUSTING = """\
examples:
  framework trust               asks whether to trust this folder
  framework trust --trust       without a question, for scripts
  framework trust --list
  framework trust --remove .
`list`, `show` and TAB run the plugins that conf/config.yaml names only in a
trusted folder, and import no other module from a folder that is not trusted.
Trust is by path and per user: it lasts when the content changes, and ends
when the folder belongs to another user. `train`, `plan`, `check` and `find`
run these plugins in any folder; `resume`, `eval` and `predict` run installed
plugins and those given with --plugins."""

BOARD = """\
examples:
  framework board
  framework board --root runs/default --port 6007"""
