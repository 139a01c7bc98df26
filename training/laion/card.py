"""The data card of a subset: data_cards/NAME.md, NAME.croissant.json and pictures in NAME/."""

from __future__ import annotations

import datetime
import itertools
import json
import shutil
from pathlib import Path
from typing import Any

from pydantic import Field, model_validator

from latentdiff.config import Config
from latentdiff.data.lockfile import LOCKFILE
from latentdiff.model_files import file_digest, staged_file
from training.laion.croissant import croissant
from training.laion.describe import CHARTS, describe, history_of
from training.laion.facts import facts
from training.laion.histograms import Histogram, drawing

LICENCES = {
    "apache-2.0": "https://www.apache.org/licenses/LICENSE-2.0",
    "cc-by-4.0": "https://creativecommons.org/licenses/by/4.0/",
    "cc-by-sa-4.0": "https://creativecommons.org/licenses/by-sa/4.0/",
    "cc0-1.0": "https://creativecommons.org/publicdomain/zero/1.0/",
    "odc-by": "https://opendatacommons.org/licenses/by/1-0/",
    "ofl-1.1": "https://openfontlicense.org/open-font-license-official-text/",
    "pddl": "https://opendatacommons.org/licenses/pddl/1-0/",
}
"""Where the text of each is, by Hugging Face's names."""

NOT_STATED = "Not stated."


class CardConfig(Config):
    """What the card says besides numbers. The defaults are what is true of any subset of LAION;
    a data set from elsewhere needs answers of its own.
    """

    folder: Path = Path("data_cards")
    """Where cards are."""
    check: bool = False
    """Write nothing; fail where what is there is not what would be written."""
    pretty_name: str | None = None
    """Title; the data set's name by default."""
    summary: str = "A subset of LAION's links to pictures on the web, with their captions."
    """One or two sentences."""
    licence: str = "cc-by-4.0"
    """Of the list of addresses and captions, by Hugging Face's names. LAION's is cc-by-4.0."""
    licence_url: str | None = None
    """Where its text is, of a licence that is not a common one."""
    licence_note: str = (
        "That is the licence of the list. To the pictures nothing here gives a right: whoever "
        "downloads them needs one, such as the exceptions for text and data mining in articles 3 "
        "and 4 of Directive (EU) 2019/790."
    )
    """What the licence is not of."""
    languages: tuple[str, ...] = ("en",)
    """Of the captions, ISO 639-1 codes."""
    version: str = Field(default="1.0.0", pattern=r"^\d+\.\d+\.\d+$")
    """MAJOR.MINOR.PATCH."""
    published: datetime.date | None = None
    """Day of publication."""
    url: str | None = None
    """Page of the data set; the card itself by default."""
    lockfile_url: str | None = None
    """Where the lockfile is published; by default a copy of it lies beside the card."""
    citation: str | None = None
    """BibTeX of a publication that describes it."""
    creators: tuple[str, ...] = ()
    """Organizations that made the subset, or people as such."""
    contact: str | None = None
    """Where a take-down is asked for, an address that someone reads."""
    purpose: str = "To fine-tune text-to-image models, with a record of what they were shown."
    """For what it was made."""
    funding: str = NOT_STATED
    """Who paid for it."""
    instances: str = (
        "Addresses of pictures on public web pages, each with the alternative text that stood "
        "beside it."
    )
    """What the samples are."""
    passing_on: str = (
        "**Links, not pictures.** What may be passed on is the lockfile: addresses, captions, "
        "hashes and scores. The pictures belong to their makers."
    )
    """What may be passed on."""
    larger: str = (
        "Yes, of the metadata above: what the conditions leave, and of that what could still be "
        "downloaded. It represents neither the web nor its metadata."
    )
    """Whether it is a sample of something larger."""
    labels: str = "The caption, written by whoever made the web page and checked by nobody."
    """What goes with a picture, and where it comes from."""
    scored_by: str = (
        "All of them are the metadata's own, from the models of those who published it."
    )
    """Where the scores come from."""
    errors: str = "Captions often do not describe their pictures."
    """What is known to be wrong in it."""
    self_contained: str = "No. Pictures lie on other people's servers, may change and disappear."
    """Whether it needs anything that others keep."""
    confidential: str = (
        "Everything was reachable without a password when it was crawled; not all of it was meant "
        "to be."
    )
    """Whether anything in it is."""
    collectors: str = "Programs did; the page's authors were not asked or paid."
    """Who collected it, and whether they were paid."""
    source: str = (
        "From LAION's metadata: pictures and alternative texts of Common Crawl's web pages, kept "
        "where CLIP found the two similar (Schuhmann et al. 2022, arXiv 2210.08402). The pictures "
        "were fetched from their own servers by img2dataset."
    )
    """Where it comes from."""
    history: str | None = None
    """What is known of the metadata's past; what is known of its family by default."""
    people: str = (
        "Yes. Many pictures show people and captions name some; they can be recognised, and found "
        "by their names. No column says who they are."
    )
    """Whether it relates to people."""
    sensitive: str = (
        "It may be: pictures and captions can tell of health, belief, politics, origin and "
        "sexuality, and private pictures have been found in LAION's data. Nothing here looks for "
        "them."
    )
    """What is sensitive in it."""
    offensive: str = (
        "Yes. The classifiers behind the unsafe scores miss pictures, nobody looked at these, and "
        "captions are not searched for slurs (Birhane et al. 2021, arXiv 2110.01963)."
    )
    """What may hurt those who see it."""
    consent: str = (
        "No. Neither the people shown nor the makers of the pictures were asked or told; a server "
        "can opt out with X-Robots-Tag, and anyone can ask the contact for a take-down."
    )
    """Whether people agreed, and how they can take it back."""
    biases: str = (
        "English and Western pages, shops and stock pictures are over-represented; CLIP and the "
        "aesthetic predictors decided by their own tastes what stayed, and links die unevenly."
    )
    """What is over- and under-represented."""
    collected: str = NOT_STATED
    """When pages were crawled and pictures fetched."""
    review: str = "Not that is known of."
    """Ethical review and its outcome."""
    uses: str = "Research on text-to-image models and fine-tuning them."
    """What it is meant for."""
    misuses: str = (
        "Recognising, tracking or judging people; pictures that pass for photographs of real "
        "people; products that need permission of the pictures' makers where there is none."
    )
    """What it should not be used for."""
    distribution: str = (
        "As a lockfile with this card. The downloaded pictures may not be passed on."
    )
    """How and to whom it is given."""
    retention: str = (
        "As long as models are trained on them. What is taken down is used no more; its file stays "
        "in images/ and in caches until whoever downloaded it deletes those."
    )
    """How long downloaded pictures are kept."""
    maintenance: str = (
        "A lockfile never changes. A correction is a new one, with a digest and a card of its own."
    )
    """Whether and how it is updated."""

    @model_validator(mode="after")
    def _known_licence(self) -> CardConfig:
        if self.licence_url is None and self.licence not in LICENCES:
            raise ValueError(f"licence_url must say where the text of {self.licence} is")
        return self


def card(config: CardConfig, name: str, directory: Path) -> None:
    """Write the card of `directory`/lock.parquet into config.folder, or check what is there.

    Its numbers are facts(directory)'s. Raises InputError when the lockfile or the selection is
    missing or damaged, SystemExit with status 1 where a check finds a difference.
    """
    files, lockfile = card_files(config, name, facts(directory)), directory / LOCKFILE
    copy = config.folder / name / LOCKFILE if config.lockfile_url is None else None
    if config.check:
        found = differences(files, config.folder, name)
        if copy is not None and not (copy.is_file() and file_digest(copy) == file_digest(lockfile)):
            found.append(f"{copy} is not a copy of {lockfile}.")
        if found:
            print("\n".join(found))
            raise SystemExit(1)
        print(f"All {len(files)} files of the card in {config.folder} are as they should be.")
        return
    for stale in _stale(files, config.folder, name):
        stale.unlink()
    for path, content in files.items():
        with staged_file(config.folder / path) as staged:
            staged.write_text(content, encoding="utf-8")
    if copy is not None:
        with staged_file(copy) as staged:
            shutil.copyfile(lockfile, staged)
    print(f"Wrote {config.folder / name}.md with {len(files) - 1} files beside it.")
    if unanswered := [f"card.{key}" for key in ASKED if not getattr(config, key)]:
        print(f"Before you publish it, set {', '.join(unanswered)}.")


ASKED = ("contact", "creators", "published")
"""What nobody can know but those who publish it, and Croissant requires."""


def card_files(config: CardConfig, name: str, counted: dict[str, Any]) -> dict[str, str]:
    """The content of each file by its path in the folder of cards, a function of the arguments."""
    files = {
        f"{name}.md": describe(config, name, counted, LICENCES),
        f"{name}.croissant.json": _json(_croissant(config, name, counted)),
        f"{name}/facts.json": _json(counted),
    }
    for quantity, (title, unit) in CHARTS.items():
        if histogram := counted["numbers"][quantity].get("histogram"):
            files[f"{name}/{quantity}.svg"] = drawing(Histogram(**histogram), title, unit)
    return files


def differences(files: dict[str, str], folder: Path, name: str) -> list[str]:
    """What is in the folder and not as in `files`: a sentence for each file."""
    found = []
    for path, content in files.items():
        if not (folder / path).is_file():
            found.append(f"{folder / path} is missing.")
        elif (there := (folder / path).read_text(encoding="utf-8")) != content:
            lines = itertools.zip_longest(there.split("\n"), content.split("\n"))
            number, (is_there, due) = next(
                (number, pair) for number, pair in enumerate(lines, 1) if pair[0] != pair[1]
            )
            found.append(f"{folder / path} differs, first in line {number}:\n- {is_there}\n+ {due}")
    stale = _stale(files, folder, name)
    return found + [f"{path} belongs to no number of this lockfile." for path in stale]


def _stale(files: dict[str, str], folder: Path, name: str) -> list[Path]:
    """Charts of an earlier card."""
    kept = {folder / path for path in files}
    return sorted(path for path in (folder / name).glob("*.svg") if path not in kept)


def _croissant(config: CardConfig, name: str, counted: dict[str, Any]) -> dict[str, Any]:
    kept, samples = counted["kept"]["samples"], counted["samples"]
    about: dict[str, Any] = {
        "name": config.pretty_name or name,
        "description": f"{config.summary} {kept:,} samples are kept of {samples:,} selected.",
        "license": config.licence_url or LICENCES[config.licence],
        "url": config.url or f"{name}.md",
        "version": config.version,
        "inLanguage": list(config.languages),
        "keywords": ["text-to-image", "image-text pairs", "links"],
    }
    if config.creators:
        about["creator"] = [{"@type": "sc:Organization", "name": who} for who in config.creators]
    if config.published:
        about["datePublished"] = config.published.isoformat()
    if config.citation:
        about["citeAs"] = config.citation
    rai = {
        "dataCollection": config.source,
        "dataBiases": config.biases,
        "dataUseCases": config.uses,
        "dataLimitations": config.misuses,
        "dataSocialImpact": config.history or history_of(counted),
        "personalSensitiveInformation": f"{config.people} {config.sensitive}",
        "dataReleaseMaintenancePlan": f"{config.maintenance} {config.retention}",
    }
    return croissant(about, counted, rai, config.lockfile_url or f"{name}/{LOCKFILE}")


def _json(values: dict[str, Any]) -> str:
    return json.dumps(values, indent=1, ensure_ascii=False) + "\n"
