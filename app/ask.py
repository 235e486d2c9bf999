"""`healthgpt ask`: a question about pictures, or about every picture of a folder."""

import itertools
import os
from contextlib import ExitStack
from pathlib import Path
from typing import Annotated

import typer

from ..conversations import answer_batch, conversation, prepare
from ..errors_healthgpt import HealthGPTError
from ..locks import alone, lock_of
from ..refusals import compiling, memory, printable
from .answers import AnswerTable, require_utf8
from .common import (
    NANO,
    AnswerTask,
    AsJson,
    Checkpoint,
    Compile,
    Device,
    Dtype,
    Frame,
    MaxNewTokens,
    OpenVINO,
    bars,
    cache_options,
    load,
    open_all,
    print_result,
    printing,
    same_file,
    split_arguments,
    stoppable,
    working,
)


def ask(
    context: typer.Context,
    arguments: Annotated[list[str], typer.Argument(metavar="[PICTURE|FOLDER]... QUESTION")],
    checkpoint: Checkpoint = NANO,
    task: AnswerTask = "comprehension",
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="For a folder: answers.csv or answers.jsonl.")
    ] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="For a folder: pictures done at once.")] = 8,
    frame: Frame = None,
    max_new_tokens: MaxNewTokens = 1024,
    as_json: AsJson = False,
    device: Device = None,
    dtype: Dtype = None,
    compile_model: Compile = False,
    openvino: OpenVINO = False,
) -> None:
    """
    Answers a question about pictures, about every picture of a folder, or about nothing but the question.

    One answer is printed as it is written, those about a folder go into a table, in the order of the files' names.

    Folders below are searched too. What cannot be read as a picture is left out, and it is said why.

    The same command goes on where it was stopped; batches change no answer in float32.

    Example: healthgpt ask -c HealthGPT-M3 chest.png "Is there a pleural effusion?"

    Example: healthgpt ask -c HealthGPT-M3 before.dcm after.dcm "What has changed?"

    Example: healthgpt ask -c HealthGPT-M3 study "Is there a pleural effusion?" -o answers.csv
    """
    paths, question = split_arguments(arguments)
    for path in paths:
        if not os.path.exists(path):
            raise HealthGPTError(f"There is no picture file {str(path)!r}, and no folder of this name.")
    folders = [path for path in paths if path.is_dir()]
    if folders and len(paths) > 1:
        raise HealthGPTError("A folder is asked about alone: name no other pictures with it.")
    if folders and output is None:
        raise HealthGPTError(
            f"{folders[0]} is a folder: name a file for the answers, -o answers.csv or -o answers.jsonl."
        )
    if not folders and output is not None:
        raise HealthGPTError("--output is for the answers about a folder; one answer is printed.")
    options = {"task": task, "max_new_tokens": max_new_tokens}
    if folders:
        settings = {
            "question": question,
            "task": task,
            "checkpoint": "nano" if checkpoint == NANO else checkpoint,
            "folder": os.path.relpath(os.path.realpath(folders[0]), os.path.realpath(output.parent)),
            "frame": "default" if frame is None else str(frame),
            "max_new_tokens": str(max_new_tokens),
        }
        context.with_resource(alone(output))  # until the command ends
        table = AnswerTable(output, settings)
        known = len(table.done)
    else:
        pictures = open_all(paths, frame)
    model, processor = load(checkpoint, device, dtype, task, openvino=openvino)
    options |= cache_options(model, compile_model)
    if folders:
        with stoppable(
            lambda: f"{len(table.done)} answers are kept in {output}; the same command goes on from there."
        ):
            left_out = ask_folder(model, processor, folders[0], table, frame, batch_size, options)
        for name, reason in left_out.items():
            typer.echo(f"Left out {name}: {printable(reason)}", err=True)
        if not table.done:
            raise HealthGPTError(f"{folders[0]} has no picture that can be asked about.")
        rows, new = len(table.done), len(table.done) - known
        content = {"output": str(output), "rows": rows, "new": new, "left_out": left_out}
        print_result(as_json, f"{printable(str(output))} ({rows} answers, {new} of them new)", content)
        return
    if as_json:
        with working("Answering"), memory(), compiling():
            [answer] = answer_batch(model, processor, [(pictures, question)], **options)
        files = [str(path) for path in paths]
        content = {"files": files, "frame": frame, "question": question, "answer": answer, "task": task}
        print_result(as_json, answer, content)
        return
    from .streamers import AnswerStreamer

    inputs = prepare(processor, conversation(pictures, question), task).to(model.device)
    with memory(), compiling(), ExitStack() as sign:
        sign.enter_context(working("Reading the question"))

        def write(text: str) -> None:
            sign.close()
            with printing():
                typer.echo(text, nl=False)

        model.generate(**inputs, **options, do_sample=False, streamer=AnswerStreamer(processor, write))
    with printing():
        typer.echo()


def ask_folder(
    model, processor, folder: Path, table: AnswerTable, frame, batch_size: int, options: dict
) -> dict[str, str]:
    """Adds the answers about a folder's pictures to the table, those that it lacks; returns the files left out, and why."""
    from ..images_healthgpt import load_picture
    from ..medical import open_picture

    question = table.settings["question"]
    files, left_out = find_files(folder)
    own = (table.path, lock_of(table.path))
    files = {name: path for name, path in files.items() if not any(same_file(path, other) for other in own)}
    waiting = [name for name in files if name not in table.done]

    def pictures():
        for name in waiting:
            try:
                require_utf8(name)
                picture = load_picture(open_picture(files[name], frame), processor.image_size)
            except HealthGPTError as error:
                left_out[printable(name)] = str(error)
                progress.advance(bar)
            else:
                yield name, picture

    with bars() as progress, memory(), compiling():
        bar = progress.add_task("Answering", total=len(files), completed=len(files) - len(waiting))
        readable = pictures()
        while batch := dict(itertools.islice(readable, batch_size)):
            questions = [([picture], question) for picture in batch.values()]
            answers = answer_batch(model, processor, questions, **options)
            table.add(dict(zip(batch, answers, strict=True)))
            progress.advance(bar, len(batch))
    return left_out


def find_files(folder: Path) -> tuple[dict[str, Path], dict[str, str]]:
    """Files of a folder and those below, by their names from there on; and folders that are left out, and why."""
    files, left_out = {}, {}

    def leave_out(path: str, reason: str) -> None:
        left_out[printable(os.path.relpath(path, folder))] = reason

    def unreadable(error: OSError) -> None:
        leave_out(error.filename, f"The folder cannot be read: {error.strerror}.")

    for place, below, names in os.walk(folder, onerror=unreadable):
        files |= {(Path(place) / name).relative_to(folder).as_posix(): Path(place) / name for name in names}
        for name in below:
            if os.path.islink(os.path.join(place, name)):
                leave_out(os.path.join(place, name), "It is a link to a folder.")
    return dict(sorted(files.items())), left_out
