"""The texts of `--help`: an overview of the commands, and examples for each."""

from collections.abc import Mapping

from .parsers import Command

OVERVIEW = """\
Compose experiments from named parts and train them with PyTorch.

usage: framework COMMAND ...

{commands}

  framework train model=mlp optimizer=sgd optimizer.lr=0.1
  framework eval runs/default/NAME

`framework COMMAND --help` prints the options and examples of a command,
`framework --version` the version.

Exit status: 0 for success; 2 for an invalid command, setting, part or data; 3
if the loss or a gradient is not finite; 1 for another error during training,
in one of your parts or in the framework (the message has its location,
--traceback shows the calls); 130 or 143 when stopped by a signal."""


def overview(commands: Mapping[str, Command]) -> str:
    """Return the text of `framework --help`."""
    lines = [f"  {name:<11} {command.summary}" for name, command in commands.items()]
    return OVERVIEW.format(commands="\n".join(lines))


TRAIN = """\
examples:
  framework train                                   an MLP on digits: seconds
  framework train model.width=256 model.depth=3 activation=gelu
  framework train optimizer=sgd optimizer.lr=0.1 scheduler=one_cycle
  framework train +callbacks=early_stop callbacks.early_stop.patience=5
  framework train ~callbacks=progress               remove one part of a list
  framework train model.activation=elu model.activation.alpha=0.5
  framework train experiment=fashion_mnist_cnn      a file in conf/experiment
  framework train -m optimizer.lr=1e-4,1e-3 'seed=range(3)'
                                                    all combinations
  framework train -m 'seed=range(9)' resume=auto    only missing trials
  framework train --repeat 5                        five seeds: mean and error
  framework train --folds 5                         cross-validation
  framework train --plugins mine.py activation=mine your own parts
  framework train --without-plugin NAME             skip an installed plugin

`framework list` prints the parts, `framework show optimizer/sgd` the settings
of one. Settings of Hydra itself have the form hydra.KEY=VALUE.
The command runs the plugins that conf/config.yaml and the experiment file
name: use a folder from other people only if you trust it."""

RESUME = """\
examples:
  framework resume runs/default/first
  framework resume runs/default/first trainer.max_epochs=60
  framework resume runs/default/first/checkpoints/step-00000040
  framework train run.name=first resume=auto     start, or resume if it exists
The result is bit for bit that of a run without interruption; settings that
would change it require --inexact. A run continues from its newest checkpoint,
or from the given one. Later checkpoints are then renamed to step-....aside,
and later log entries are dropped."""

PLAN = """\
examples:
  framework plan experiment=fashion_mnist_cnn
  framework plan model=cnn data=fashion_mnist --json
  framework plan trainer.devices=8 strategy=fsdp
  framework plan -m optimizer.lr=1e-3,1e-2 model.width=32,64
Prints the layers with shapes, parameters and FLOPs, the number of steps, the
learning rate schedule and the memory; with trainer.devices=N the memory of a
process and the bytes that it sends per step. It builds the experiment like
`train`, and so runs the plugins that conf/config.yaml and the experiment file
name."""

CHECK = """\
examples:
  framework check
  framework check experiment=fashion_mnist_cnn
Trains two steps and validates; saves a checkpoint after the first step,
resumes from it and compares all weights; overfits one batch; compares the
gradients of a step on two processes with those of one. Keeps no files.
The exit status is 0 if all checks pass. Runs the plugins that
conf/config.yaml and the experiment file name."""

FIND = """\
examples:
  framework find lr                                 an MLP on digits
  framework find lr experiment=fashion_mnist_cnn optimizer=sgd
  framework find batch_size experiment=fashion_mnist_cnn
`lr` increases the learning rate in each of 100 steps and prints where the
loss falls. `batch_size` doubles the batch size until memory is full or
training is no longer faster. Both run the plugins that conf/config.yaml and
the experiment file name."""

DIFF = """\
examples:
  framework diff runs/default/first runs/default/second
  framework diff runs/digits/sweep/00[01]* --curves val/loss
  framework diff runs/digits/sweep runs/digits/other      their best trials
  framework diff A B C --json
Prints the settings that differ, with the file and line or the override that
gave each value; differences of the code, of versions and of the data; the
metrics, the time, and the curves. What a run does not record is left out."""

EXPLAIN = """\
examples:
  framework explain optimizer.lr experiment=digits_cnn optimizer.lr=0.1
  framework explain trainer                         all settings of a section
  framework explain optimizer.lr --run runs/default/first
  framework explain speed runs/default/first
  framework explain nan runs/default/first
Of a setting: the value, the file and line or the override that gives it, and
the values that this one replaces, down to the default in the signature.
`speed` prints where the time of a run went, and what to change. `nan` repeats
the step at which a run was stopped by callbacks.non_finite, from its last
checkpoint, and names the first layer and parameter that are not finite."""

EVAL = """\
examples:
  framework eval runs/default/first
  framework eval runs/default/first --split val --checkpoint last --json
  framework eval runs/table/first --data new.csv
  framework eval runs/default/first --worst 16      the largest losses
  framework eval runs/default/first --curves        PR, ROC, calibration
--data takes a file or folder with inputs and targets, in the format of the
run's data: a table, a folder with a folder for each class, an Arrow file.
--worst prints the samples with the largest loss (of each alone), their label
and prediction; --curves average precision and area under the ROC curve of each
class against all others, and the calibration error (15 bins). Both write files
into the folder `evaluation` of the run (images of the samples, charts, points)
and record them for TensorBoard."""

LANDSCAPE = """\
examples:
  framework landscape runs/default/first
  framework landscape runs/default/first --against runs/default/second
  framework landscape runs/default/first --directions random --span 0.5
The loss on a plane through the weights of the run (Li et al. 2018). With three
checkpoints or more, the plane is that of their two main directions (PCA), with
their path. Otherwise it has two random directions, in which each filter has
the norm of the filter of the model: 1 is a change as large as the weights.
Biases and the parameters of norms stay as they are; so do the statistics of
batch norm. --against draws both runs with the same colors and the same range.
The picture and the numbers are in the folder `evaluation` of the run."""

PREDICT = """\
examples:
  framework predict runs/default/first --input new.npz --output labels.csv
  framework predict runs/table/first --input new.csv --id customer --output -
  framework predict runs/table/first --input "days/*.csv" --output all.parquet
  framework predict runs/pets/first --input pictures/ --output labels.jsonl
  cat new.csv | framework predict runs/table/first --input - --output -
  framework predict runs/lm_bpe/first --prompt "def " --length 300
The input has the format of the files of the run's data set. On stdin a table
is CSV; texts are lines, CSV or JSON lines. Each prediction has the number of
its row (from 1) or the columns of --id, and the file if there are several.
`class` is the name of the most likely class, `class_index` its number,
`probability` that of this class, `probabilities:NAME` those of all classes.
Tables, texts, images, sounds, Arrow files and the .npy files of data=npz are
read and written in chunks: any size needs little memory. Others are read as a
whole, and .npz output is collected in memory.
.npy has the probabilities or values as one array. Images are PNG files."""

EXPORT = """\
examples:
  framework export runs/default/first --to onnx
  framework export runs/default/first --to torch_export --output model
  framework export runs/default/first --to safetensors --checkpoint last
The folder gets the model with its preprocessing, metadata.json, a model card
(README.md) and example.py, which applies it to a file without the framework.
The data of the run is needed: the files must give the outputs of the run for
samples of its test split, otherwise nothing is written. `framework list
exporter` prints the formats."""

LIST = """\
examples:
  framework list               the kinds, and the number of parts of each
  framework list optimizer     the parts of a kind
  framework list experiment    the experiments in the config folders
  framework list --json        all parts with their settings
Plugins that conf/config.yaml names are loaded only in a trusted folder (see
`framework trust --help`), plugins from --plugins always."""

SHOW = """\
examples:
  framework show optimizer/adamw
  framework show gelu --json
  framework show relu gelu sigmoid                      in one chart
  framework show scheduler/cosine scheduler.warmup=0.1
  framework show sgd optimizer.momentum=0,0.9           a curve for each value
Activations, schedules, losses, initializers and optimizers are drawn.
Plugins are loaded as by `framework list`."""

TRUST = """\
examples:
  framework trust               ask whether to trust the current folder
  framework trust --trust       trust it without a question, for scripts
  framework trust --list
  framework trust --remove .
`list`, `show` and TAB run the plugins that conf/config.yaml names only in a
trusted folder, and import no other module from an untrusted folder. Trust is
by path and for one user. It does not depend on the content of the folder, and
ends when the folder belongs to another user. `train`, `plan`, `check` and
`find` run these plugins in any folder; `resume`, `eval` and `predict` run
installed plugins and those from --plugins."""

DATA = """\
examples:
  framework data convert flights.csv flights.arrow
  framework data convert table.parquet table.arrow --overwrite
  framework data convert images/ images.arrow       images/CLASS/*.jpg
  framework data convert sounds/ out/              folders train, val and test
IN is a file (.csv, .tsv, .jsonl, .parquet, .arrow; CSV and JSON lines also
.gz), or a folder with a folder of images, sounds or texts (.txt) for each
class. If IN has folders train, val or test of such folders, OUT is a folder
with a file for each. The conversion needs little memory, for any size of IN.
OUT appears when it is complete. `framework show data/arrow` prints how to
train on it: framework train data=arrow data.path=flights.arrow
data.target=late"""

WATCH = """\
examples:
  framework watch                         those that run, or the latest one
  framework watch runs/default/first runs/default/second
  framework watch runs/default/my_sweep   the trials of a sweep as a table
  framework watch | cat                   print the present state once
Keys: up and down (or tab) select a run, left and right the curves, q quits.
It reads status.json and metrics.jsonl (loggers=json_lines) only; the runs do
not notice it."""

TELL = """\
examples:
  framework tell runs/default/first checkpoint
  framework tell runs/default/first set optimizer.lr=1e-4
  framework tell runs/default/first set optimizer.lr=1e-4 optimizer.eps=1e-7
  framework tell runs/default/first pause         continue lets it go on
  framework tell runs/default/first stop          saves; `resume` continues it
The run carries out the commands at the end of a step, all of them or none, and
records them in events.jsonl. `framework resume` repeats the changed settings
at the same steps. With a schedule, optimizer.lr is the rate that the schedule
multiplies. Only the user of the run can `tell` it. In a sweep, stop ends one
trial; the sweep continues."""

BOARD = """\
examples:
  framework board
  framework board --root runs/default --port 6007
  framework board --runs best            the ten best ones
  framework board --runs best --runs data=digits
  framework board --runs 'sweep3/*' --runs default/first
  framework board --runs 'lr=0.01*'      trials of sweeps, by their names
  framework board --runs 'optimizer=ada* and val/accuracy>0.9'
TensorBoard selects no run at first if there are more than 40. Filters are
those of `framework runs --where`. Runs that begin later appear if they match."""

SCHEMA = """\
examples:
  framework schema --output conf/experiment.schema.json
  framework schema --output conf/experiment.schema.json --plugins my_parts.py
First line of conf/experiment/NAME.yaml, for editors with the YAML language
server (in VS Code: the extension YAML by Red Hat):
  # yaml-language-server: $schema=../experiment.schema.json
The editor then completes names and settings, and marks wrong ones."""

COMPLETION = """\
examples:
  source <(framework completion bash)            for this shell only
  framework completion bash >> ~/.bashrc         for all later shells"""

RUNS = """\
examples:
  framework runs                                    the newest first
  framework runs runs/default --expand              one experiment, all trials
  framework runs --where 'optimizer=adamw and val/accuracy>0.9' --sort val/loss
  framework runs --where 'state=failed or tags=baseline' --columns name,reason
  framework runs --columns +started,val/loss:step   two more columns
  framework runs --json                             for programs
  framework runs tag default/first baseline         a tag; --remove removes it
  framework runs note default/first 'labels were shuffled'
  framework runs remove runs/default/grid           moves it to runs/.bin
  framework runs restore default/first
  framework runs empty                              deletes the removed runs
  framework runs --bin                              lists the removed runs
Columns are settings (optimizer.lr, or lr if that is unique), metrics (val/loss
is the best value; also val/loss:last, :min, :max, and :step of the best) and
name, experiment, state, reason, step, total_steps, started, updated, time,
processes, sweep, tags, note, problems.
States: running; paused; testing; stale (its process ended without a result);
failed; stopped; done; unknown (status.json is missing or damaged).
A filter has = != < <= > >= ~ (contains), and, or, not and parentheses."""

RUNS_TAG = """\
examples:
  framework runs tag runs/default/first baseline good
  framework runs tag runs/default/first good --remove
  framework runs tag runs/digits/sweep wide         a sweep and all its trials
  framework runs --where tags=baseline"""

RUNS_NOTE = """\
examples:
  framework runs note runs/default/first 'labels were shuffled'
  framework runs note runs/default/first ''         removes the note
  framework runs --where 'note~shuffled'"""

RUNS_REMOVE = """\
examples:
  framework runs remove runs/default/first          moves it to runs/.bin
  framework runs --bin                              lists the removed runs
  framework runs restore default/first
  framework runs empty                              deletes the removed runs
A running run is not removed."""

BEST = """\
examples:
  framework best
  framework best runs/default --metric val/accuracy
  framework best --where 'model=cnn and time<600'
  framework eval $(framework best)
Prints only the folder of the run on standard output. A run counts with the
best value of its metric, for which it has a checkpoint by default."""

RERUN = """\
examples:
  framework rerun runs/default/first
  framework rerun runs/default/first seed=1 trainer.max_epochs=60
  framework rerun $(framework best) run.name=again
A new run with the config of another one, in the folder of the same experiment.
Before it starts, differences are printed: code (git commit and uncommitted
changes), versions, and data."""

TOUR = """\
examples:
  framework tour                                    from the first lesson
  framework tour --list
  framework tour --lesson 3
  framework tour --lesson 6 optimizer=adamw         with other settings
A lesson explains, runs its commands, and asks a question. Between lessons:
next, back, repeat with settings of your own, or quit. Runs are in ./runs.
Without a terminal, all lessons are printed and run."""
