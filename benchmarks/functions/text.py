"""Text: strings, words, lines, formatting and the parsing of small formats."""

from . import cases


@cases(("port = 80   # web",), ("# all of it",), ("  name",), ("a#b#c",), ("",), ("tail   ",))
def comment_free(line: str) -> str:
    """The part of the line before its first "#" (the whole line if it has none), without spaces at its end.
    Spaces at its start stay. An empty line gives an empty string.

    >>> comment_free("  speed = 3 # fast # or so")
    '  speed = 3'
    """
    code = line.split("#")[0]
    return code.rstrip(" ")


@cases((["a", "bbb"],), ([],), ([""],), (["one", "two"],), (["", "ab", "c"],))
def dots_before_words(words: list[str]) -> list[str]:
    """Each word with as many dots in front as make it as long as the longest word. An empty list gives an
    empty list.

    >>> dots_before_words(["tea", "coffee"])
    ['...tea', 'coffee']
    """
    width = max((len(word) for word in words), default=0)
    return [word.rjust(width, ".") for word in words]


@cases((["a ", " b"],), ([],), (["  "],), ([""],), (["no end", "x  y   "],))
def trailing_spaces_shown(lines: list[str]) -> list[str]:
    """The lines, with the spaces at the end of each replaced by as many dots. Other spaces stay; a line of
    spaces only becomes all dots. No lines give an empty list.

    >>> trailing_spaces_shown(["  go on", "stop  "])
    ['  go on', 'stop..']
    """
    shown = []
    for line in lines:
        shown.append(line.rstrip(" ").ljust(len(line), "."))
    return shown


@cases((1, "cat"), (0, "cat"), (12, "file"), (-1, "point"), (-3, "point"))
def counted_noun(count: int, noun: str) -> str:
    """The count, a space and the noun, with "s" added to the noun unless the count is 1 or -1. A count of 0
    is written "no".

    >>> counted_noun(3, "apple")
    '3 apples'
    >>> counted_noun(0, "apple")
    'no apples'
    """
    shown = "no" if count == 0 else str(count)
    ending = "" if abs(count) == 1 else "s"
    return f"{shown} {noun}{ending}"


@cases((["", "a", "", "b", "  "],), ([],), (["", " "],), ([" a "],), (["", "", "x"],), (["x", "", "y"],))
def without_edge_blank_lines(lines: list[str]) -> list[str]:
    """The lines without the blank ones at the start and at the end; blank lines in between stay. A blank
    line is empty or has only spaces. If all are blank, or there are none, the result is empty.

    >>> without_edge_blank_lines(["", "one", "", "two", " "])
    ['one', '', 'two']
    """
    filled = [index for index, line in enumerate(lines) if line.strip()]
    if not filled:
        return []
    return lines[filled[0] : filled[-1] + 1]


@cases((["[x] a", "[x] b"],), ([],), (["note", ""],), (["[ ] a"],), (["[x] a", "see [x]", "[ ] b", "[ ] c"],))
def checklist_progress(lines: list[str]) -> str:
    """How far a checklist is, as "done/all". A line that starts with "[x]" is a done item, one that starts
    with "[ ]" an open item; other lines are not items. Without items the result is "0/0".

    >>> checklist_progress(["Today", "[x] wash", "[ ] cook", "[ ] read"])
    '1/3'
    """
    done = sum(line.startswith("[x]") for line in lines)
    still_open = sum(line.startswith("[ ]") for line in lines)
    return f"{done}/{done + still_open}"


@cases((["to be or not"],), ([],), ([""],), (["one two", "  ", "a bb cc"],), (["x"],))
def longest_word_of_each_line(lines: list[str]) -> list[str]:
    """For each line its longest word, the first of them if several are equally long. Words are parted by
    spaces; a line without words gives an empty string. No lines give an empty list.

    >>> longest_word_of_each_line(["the brown foxes", "", "go"])
    ['brown', '', 'go']
    """
    longest = []
    for line in lines:
        longest.append(max(line.split(), key=len, default=""))
    return longest


@cases(("example.org:8080", 80), ("example.org", 443), ("box:", 22), (":9000", 80), ("", 1), ("db:0", 5))
def host_and_port(address: str, default_port: int) -> tuple[str, int]:
    """The host and the port of an address "host:port", which has at most one colon. With no colon, or with
    nothing after it, the port is the default one; with nothing before the port, the host is "localhost".

    >>> host_and_port("mail.net:25", 80)
    ('mail.net', 25)
    >>> host_and_port("", 80)
    ('localhost', 80)
    """
    host, _, port = address.partition(":")
    return (host or "localhost", int(port) if port else default_port)


@cases(("time-out",), ("",), ("  cache   size ",), ("a - b",), ("Level2",), ("-x-",))
def constant_name(label: str) -> str:
    """The label in upper case, with its words joined by single underscores. Words are parted by any mix of
    spaces and hyphens; spaces and hyphens at either end are dropped. A label without words gives "".

    >>> constant_name("max retry-count")
    'MAX_RETRY_COUNT'
    """
    words = label.replace("-", " ").split()
    return "_".join(words).upper()


@cases(("a b c", "c a"), ("", "x"), ("x y", ""), ("No no NO", "no"), ("one two", "three"), ("Cat", "a cat"))
def words_also_in(first: str, second: str) -> list[str]:
    """The words of the first text that occur as whole words in the second, upper and lower case taken as
    equal. They come in the order of the first text and as written there, repeats included; without any the
    list is empty. Words are parted by spaces.

    >>> words_also_in("The red Fox saw the hen", "a fox and the dog")
    ['The', 'Fox', 'the']
    """
    known = second.lower().split()
    return [word for word in first.split() if word.lower() in known]


@cases(("abc\nab\nabcd", 2), ("", 0), ("abc", 3), ("abcd", 3), ("\n\na", 0), ("a b c\n", 4))
def overlong_line_numbers(text: str, limit: int) -> list[int]:
    r"""The numbers, counted from 1, of the lines with more than limit characters. Lines are parted by "\n",
    which is not one of their characters; if there are no such lines the result is empty.

    >>> overlong_line_numbers("one\nthree\nfour", 3)
    [2, 3]
    """
    lines = text.split("\n")
    return [number for number, line in enumerate(lines, start=1) if len(line) > limit]


@cases((["a", "b"],), ([],), (["", ""],), (["", "x"],), (["x", "", "", "y", "z"],))
def numbered_filled_lines(lines: list[str]) -> list[str]:
    """The lines with "1. ", "2. " and so on put in front of them. Empty lines stay empty and are not
    counted. No lines give an empty list.

    >>> numbered_filled_lines(["wash", "", "cook"])
    ['1. wash', '', '2. cook']
    """
    numbered = []
    count = 0
    for line in lines:
        if line:
            count += 1
        numbered.append(f"{count}. {line}" if line else "")
    return numbered


@cases((["a", "b"], 2), ([], 3), (["Ann"], 1), (["a", "b", "c", "d"], 1), (["x", "x", "x"], 2), (["a"], 4))
def names_and_more(names: list[str], limit: int) -> str:
    """The first names, at most limit of them, joined by ", "; if N names are left over, " and N more"
    follows. No names give "nobody". The limit is at least 1.

    >>> names_and_more(["Ann", "Bob", "Cy", "Di", "Ed"], 2)
    'Ann, Bob and 3 more'
    """
    if not names:
        return "nobody"
    left_over = len(names) - limit
    shown = ", ".join(names[:limit])
    return f"{shown} and {left_over} more" if left_over > 0 else shown


@cases(("1h 5m",), ("",), ("90",), ("2h 15",), ("10s 1m",), ("0h 0s",), ("1h 1h",))
def duration_in_seconds(text: str) -> int:
    """The sum, in seconds, of the parts of a duration, which are parted by spaces. A part is a whole number
    followed by "h" (hours), "m" (minutes) or "s" (seconds); a bare number means minutes. Without parts it
    is 0.

    >>> duration_in_seconds("1h 20m 5s")
    4805
    >>> duration_in_seconds("3")
    180
    """
    sizes = {"h": 3600, "m": 60, "s": 1}
    total = 0
    for part in text.split():
        if part[-1] in sizes:
            total += int(part[:-1]) * sizes[part[-1]]
        else:
            total += int(part) * 60
    return total


@cases(("##-##", "1234"), ("##-##", "123"), ("#", "98"), ("", "12"), ("no", "1"), ("(#) #", ""))
def filled_mask(mask: str, digits: str) -> str:
    """The mask with each "#", from left to right, replaced by the next of the digits. When the digits run
    out, the remaining "#" become "_"; digits left over are ignored. All other characters of the mask stay;
    an empty mask gives an empty string.

    >>> filled_mask("(##) ###", "1234")
    '(12) 34_'
    """
    filled = ""
    used = 0
    for character in mask:
        if character == "#":
            character = digits[used] if used < len(digits) else "_"
            used += 1
        filled += character
    return filled


@cases(("X7", "A9"), ("x7", "A9"), ("", ""), ("AB", "A"), ("K-", "A*"), ("9-1", "9-2"), ("A", "9"))
def fits_mask(text: str, mask: str) -> bool:
    """Whether the text has the length of the mask and each of its characters fits the one at the same place
    in the mask. There "9" stands for any digit, "A" for any capital letter, "*" for any character, and
    every other character for itself only. An empty text fits an empty mask.

    >>> fits_mask("B-42", "A-99")
    True
    >>> fits_mask("B-4x", "A-99")
    False
    """
    if len(text) != len(mask):
        return False
    for character, sign in zip(text, mask, strict=True):
        fits = {"9": character.isdigit(), "A": character.isupper(), "*": True}
        if not fits.get(sign, character == sign):
            return False
    return True


@cases(
    (["a\\", "b"],), ([],), (["a", "b"],), (["a \\", "  b\\", "c", "d"],), (["x", "end\\"],), (["\\", "y"],)
)
def joined_continuations(lines: list[str]) -> list[str]:
    r"""The lines, where one that ends in a backslash loses it and is joined with the next line, from which
    the spaces at its start are dropped first. Several in a row join into one line; if the very last line
    ends in a backslash, it only loses it. No lines give an empty list.

    >>> joined_continuations(["cc -c \\", "    main.c", "ls"])
    ['cc -c main.c', 'ls']
    """
    joined = []
    continues = False
    for line in lines:
        if continues:
            line = joined.pop() + line.lstrip(" ")
        continues = line.endswith("\\")
        joined.append(line[:-1] if continues else line)
    return joined


@cases(
    (["1 INFO a", "2 INFO b"],),
    ([],),
    (["9 WARN x", "10 WARNING y"],),
    (["", "INFO", "3 ERROR"],),
    (["1 warn a", "2 WARN INFO"],),
)
def level_counts(lines: list[str]) -> dict[str, int]:
    """How many lines there are of each level. The level is the second word of a line, where "WARN" counts
    as "WARNING" (capitals only); lines with fewer than two words are skipped. Words are parted by spaces.
    Without levels the dict is empty.

    >>> level_counts(["10:00 INFO up", "10:01 WARN slow", "10:02 WARNING slow", "end"])
    {'INFO': 1, 'WARNING': 2}
    """
    counts = {}
    for line in lines:
        words = line.split()
        if len(words) >= 2:
            level = "WARNING" if words[1] == "WARN" else words[1]
            counts[level] = counts.get(level, 0) + 1
    return counts


@cases(
    ("pin=12 id=3", ["pin"]),
    ("", ["pin"]),
    ("PIN=12", ["pin"]),
    ("pin= pin", ["pin"]),
    ("a=1=2 b=c", ["a", "b"]),
    ("a=1", []),
)
def redacted(line: str, secret_keys: list[str]) -> str:
    """The line, whose words are parted by single spaces, with "***" in place of secret values. A word is
    "key=value", parted at its first "=", or has no "=" and stays. A value is secret if it is not empty and
    its key, in lower case, is one of the secret keys, which are in lower case. An empty line stays empty.

    >>> redacted("login user=bob Password=abc ok", ["password", "token"])
    'login user=bob Password=*** ok'
    """
    words = []
    for word in line.split(" "):
        key, _, value = word.partition("=")
        if value and key.lower() in secret_keys:
            word = key + "=***"
        words.append(word)
    return " ".join(words)


@cases(
    ("{a}-{b}", {"a": "1", "b": "2"}),
    ("", {"a": "1"}),
    ("{a}{a}", {"a": "xy"}),
    ("{c} a", {"a": "1"}),
    ("{a}", {"a": "{b}", "b": "no"}),
    ("[{a}]", {"a": ""}),
)
def filled_template(template: str, values: dict[str, str]) -> str:
    """The template with each "{name}" replaced by the value of that name; one without a value stays as it
    is, braces included. Braces come only in such pairs around a name of letters. Text that was put in is
    not looked at again. An empty template stays empty.

    >>> filled_template("Dear {name}, you owe {sum}.", {"name": "Ann"})
    'Dear Ann, you owe {sum}.'
    """
    import re

    def value_of(match):
        return values.get(match.group(1), match.group(0))

    return re.sub(r"\{(\w+)\}", value_of, template)


@cases(
    (["1.9", "1.10"],),
    ([],),
    (["2.0", "2"],),
    (["0", "0.0.0"],),
    (["3.1", "3.1.1", "3.0.9"],),
    (["1.2.0", "1.2", "1.1"],),
)
def latest_version(versions: list[str]) -> str:
    """The highest of the versions, as written. They are numbers joined by dots and are compared number by
    number from the left, where missing numbers at the end count as 0. Of equal ones the first in the list
    is taken; an empty list gives "".

    >>> latest_version(["1.2", "1.10.3", "1.9"])
    '1.10.3'
    """

    def key(version):
        numbers = [int(part) for part in version.split(".")]
        while numbers and numbers[-1] == 0:
            numbers.pop()
        return numbers

    return max(versions, key=key, default="")


@cases(
    ("1.2.3", "patch"),
    ("1.2.3", "major"),
    ("0.0.0", "minor"),
    ("v9.9.9", "minor"),
    ("v1.0.9", "patch"),
    ("v0.3.1", "major"),
)
def bumped_version(version: str, part: str) -> str:
    """The version "major.minor.patch" with the part named "major", "minor" or "patch" raised by 1 and all
    parts to the right of it set to 0. A "v" in front of the version stays there.

    >>> bumped_version("v1.4.2", "minor")
    'v1.5.0'
    """
    prefix = "v" if version.startswith("v") else ""
    numbers = [int(number) for number in version.removeprefix("v").split(".")]
    place = ["major", "minor", "patch"].index(part)
    numbers[place] += 1
    numbers[place + 1 :] = [0] * (2 - place)
    return prefix + ".".join(str(number) for number in numbers)


@cases(("abcdefgh", 5), ("abcdefgh", 8), ("abcdefgh", 6), ("", 2), ("abc", 2), ("abcd", 3))
def middle_cut(text: str, width: int) -> str:
    """The text, if it is longer than width, cut to exactly width characters by putting ".." in place of its
    middle; the start and the end that stay are equally long, or the start is one longer. A text that is not
    longer stays as it is. The width is at least 2.

    >>> middle_cut("picture_final.png", 9)
    'pict..png'
    """
    if len(text) <= width:
        return text
    kept = width - 2
    tail = kept // 2
    return text[: kept - tail] + ".." + text[len(text) - tail :]


@cases(("123456",), ("12-34",), ("",), ("no: 98 76 5",), ("a1b2c3d4e5f6",), ("1234",))
def masked_digits(text: str) -> str:
    """The text with every digit but the last four replaced by "*". Characters that are not digits stay; a
    text with four digits or fewer does not change.

    >>> masked_digits("card 1234-5678")
    'card ****-5678'
    """
    to_hide = sum(character.isdigit() for character in text) - 4
    masked = ""
    for character in text:
        if character.isdigit():
            masked += "*" if to_hide > 0 else character
            to_hide -= 1
        else:
            masked += character
    return masked


@cases(("ab\ncd", 0), ("ab\ncd", 2), ("ab\ncd", 3), ("", 0), ("\n\nx", 2), ("abc", 3), ("a\n", 2))
def line_and_column(text: str, offset: int) -> tuple[int, int]:
    r"""The line and the column, both counted from 1, of the place before which there are offset characters
    in the text. A "\n" is the last character of its line. The offset is at least 0 and at most the text's
    length; an empty text has the one place (1, 1).

    >>> line_and_column("one\ntwo", 5)
    (2, 2)
    >>> line_and_column("one\ntwo", 3)
    (1, 4)
    """
    before = text[:offset].split("\n")
    return (len(before), len(before[-1]) + 1)


@cases(
    (["08:00 a", "08:10 b", "09:00 c"], 10),
    ([], 5),
    (["10:00 x"], 0),
    (["10:00 x", "10:00 y", "10:01 z"], 0),
    (["09:50 go", "10:20 came back", "11:30 end"], 29),
    (["08:00 a", "08:30 b"], 10),
)
def messages_after_silence(lines: list[str], minutes: int) -> list[str]:
    """The messages that came more than so many minutes after the line before. A line is "HH:MM message",
    and the lines are of one day and in order of time; the first line never counts. Without such messages
    the list is empty.

    >>> messages_after_silence(["09:58 up", "10:05 late reply", "10:06 bye"], 5)
    ['late reply']
    """
    found = []
    earlier = None
    for line in lines:
        time, _, message = line.partition(" ")
        now = int(time[:2]) * 60 + int(time[3:])
        if earlier is not None and now - earlier > minutes:
            found.append(message)
        earlier = now
    return found


@cases((["b1", "a10", "a9"],), ([],), (["x", "x0", "w5"],), (["p2", "p", "p1"],), (["n01", "n1", "n0"],))
def numbered_name_order(names: list[str]) -> list[str]:
    """The names sorted. A name is small letters, perhaps followed by digits; names are ordered by their
    letters first, then by the number that the digits form, and a name without digits comes before those
    with the same letters. Names equal in both, such as "a1" and "a01", keep their order; no names give an
    empty list.

    >>> numbered_name_order(["fig10", "fig9", "fig", "map1"])
    ['fig', 'fig9', 'fig10', 'map1']
    """

    def key(name):
        letters = name.rstrip("0123456789")
        digits = name[len(letters) :]
        return (letters, int(digits) if digits else -1)

    return sorted(names, key=key)


@cases(
    (["Al: a b", "Bo: c", "Al: d"],),
    ([],),
    (["no name here"],),
    (["lost", "Al: one", "two three"],),
    (["Al: x", "", "Bo: y z", "more"],),
    (["Al: note: b"],),
)
def words_spoken(lines: list[str]) -> dict[str, int]:
    """How many words each speaker says. A line "Name: words" has the speaker before its first ": "; a line
    without ": " goes on with the speaker of the line before, all its words counting. Lines before the first
    speaker are skipped; without speakers the dict is empty. Words are parted by spaces, and every speaker
    says at least one word after the name.

    >>> words_spoken(["Ann: well then", "let us go", "Bob: no"])
    {'Ann': 5, 'Bob': 1}
    """
    counts = {}
    speaker = None
    for line in lines:
        if ": " in line:
            speaker, line = line.split(": ", 1)
        if speaker is not None:
            counts[speaker] = counts.get(speaker, 0) + len(line.split())
    return counts


@cases(
    (["# A", "# B"],),
    ([],),
    (["text", "#tag", ""],),
    (["# A", "## B", "# C", "## D"],),
    (["# A", "### B"],),
    (["## A", "# B", "x # y"],),
)
def numbered_headings(lines: list[str]) -> list[str]:
    """The headings with their numbers. A heading is a line that starts with one or more "#", a space and
    the title; its level is the count of "#". Its number has one count for each level down to its own,
    joined by dots: counts start at 0, and a heading raises the count of its level by 1 and sets all deeper
    counts to 0. Other lines are left out; without headings the list is empty.

    >>> numbered_headings(["# Intro", "some text", "## Aim", "## Scope", "# Method", "## Data"])
    ['1 Intro', '1.1 Aim', '1.2 Scope', '2 Method', '2.1 Data']
    """
    counts = []
    headings = []
    for line in lines:
        marks, space, title = line.partition(" ")
        if not space or not marks or marks.strip("#"):
            continue
        level = len(marks)
        counts = (counts + [0] * level)[:level]
        counts[-1] += 1
        headings.append(".".join(str(count) for count in counts) + " " + title)
    return headings


@cases(
    (["go", "stop", "caps", "on"],),
    ([],),
    (["stop", "scratch", "a"],),
    (["a", "stop", "stop", "b"],),
    (["a", "b", "stop", "scratch", "stop"],),
    (["caps", "scratch", "x", "y"],),
    (["a", "caps"],),
)
def dictated(words: list[str]) -> str:
    """The dictated text, its words joined by single spaces. Three words are commands, not text: "stop" adds
    a dot to the end of the text's last word, "scratch" removes the text's last word along with its dots,
    and "caps" puts the next word that is no command in upper case. While the text has no words, "stop" and
    "scratch" do nothing; a text that ends up without words is an empty string.

    >>> dictated(["we", "won", "lost", "scratch", "stop", "caps", "really", "so"])
    'we won. REALLY so'
    """
    text = []
    capital = False
    for word in words:
        if word == "caps":
            capital = True
        elif word in ("stop", "scratch"):
            last = text.pop() if text else None
            if word == "stop" and last is not None:
                text.append(last + ".")
        else:
            text.append(word.upper() if capital else word)
            capital = False
    return " ".join(text)


@cases(
    (["08:00 a", "08:01 a"],),
    ([],),
    (["08:00 a", "08:00 b", "08:00 a"],),
    (["07:00 up and on"],),
    (["01:00 x", "01:01 x", "01:02 x", "01:03 y", "01:04 y"],),
)
def folded_log(lines: list[str]) -> list[str]:
    """The log lines "HH:MM message", with each run of neighbouring lines of the same message folded into
    its first line. A folded line of two or more ends in " (xN)", N being their count; a line on its own
    stays. No lines give an empty list.

    >>> folded_log(["10:00 no link", "10:01 no link", "10:02 up", "10:09 no link"])
    ['10:00 no link (x2)', '10:02 up', '10:09 no link']
    """
    runs = []
    for line in lines:
        if runs and runs[-1][0][6:] == line[6:]:
            runs[-1][1] += 1
        else:
            runs.append([line, 1])
    return [f"{line} (x{count})" if count > 1 else line for line, count in runs]


@cases(
    ("a.txt", ["a.txt"]),
    ("a.txt", []),
    ("notes", ["notes", "notes-2"]),
    ("a.b.c", ["a.b.c", "a.b-3.c"]),
    (".rc", [".rc"]),
    ("x.py", ["x-2.py", "y.py"]),
    ("x.py", ["x.py", "x-2.py", "x-3.py"]),
)
def free_file_name(name: str, taken: list[str]) -> str:
    """The name itself if it is not taken; otherwise the name with "-2" put in before its extension, or "-3"
    and so on, the first that is not taken. The extension starts at the last dot. A name without a dot, or
    whose only dot is its first character, has no extension and gets the number at its end.

    >>> free_file_name("plan.txt", ["plan.txt", "plan-2.txt"])
    'plan-3.txt'
    >>> free_file_name(".env", [".env"])
    '.env-2'
    """
    dot = name.rfind(".")
    if dot <= 0:
        dot = len(name)
    candidate = name
    number = 2
    while candidate in taken:
        candidate = f"{name[:dot]}-{number}{name[dot:]}"
        number += 1
    return candidate


@cases(("a,b",), ("",), ('"a,b"',), ("a,,",), ('x"y,z"w, v',), ('"","b',), ('a,"b,c',))
def quoted_fields(line: str) -> list[str]:
    """The fields of a line, which are parted by commas. Commas between an opening and a closing double
    quote do not part; a quote that is never closed reaches to the end of the line. All quotes are dropped,
    all else stays, spaces too. The empty line has one field, which is empty.

    >>> quoted_fields('12,"Rome, Italy",no')
    ['12', 'Rome, Italy', 'no']
    """
    fields = [""]
    quoted = False
    for character in line:
        if character == '"':
            quoted = not quoted
        elif character == "," and not quoted:
            fields.append("")
        else:
            fields[-1] += character
    return fields


@cases(
    (["Mon", "Tue", "Wed"],),
    ([],),
    (["Sun"],),
    (["Mon", "Tue"],),
    (["Mon", "Wed", "Thu", "Fri", "Sun"],),
    (["Mon", "Sat", "Sun"],),
    (["Mon", "Tue", "Wed", "Thu", "Fri", "Sat", "Sun"],),
)
def open_days(days: list[str]) -> str:
    """The days of a week that a shop is open, as short text. They are given as "Mon", "Tue", "Wed", "Thu",
    "Fri", "Sat" and "Sun", in this order and each at most once. Three or more days in a row are written as
    the first and the last with "-" between them; the others stand alone. All is joined by ", ". Without
    days the text is "closed".

    >>> open_days(["Mon", "Tue", "Wed", "Fri", "Sat"])
    'Mon-Wed, Fri, Sat'
    """
    week = ["Mon", "Tue", "Wed", "Thu", "Fri", "Sat", "Sun"]
    runs = []
    for day in days:
        if runs and week.index(day) == week.index(runs[-1][-1]) + 1:
            runs[-1].append(day)
        else:
            runs.append([day])
    parts = []
    for run in runs:
        parts += [f"{run[0]}-{run[-1]}"] if len(run) > 2 else run
    return ", ".join(parts) or "closed"


@cases(
    (["ab", "7"], [3, 3]),
    ([], []),
    ([], [2, 1]),
    (["abcd"], [3]),
    (["1234"], [3]),
    (["ab", "12"], [2, 2]),
    (["x", "", "-5"], [2, 1, 4]),
)
def table_row(cells: list[str], widths: list[int]) -> str:
    """The cells joined by "|", each filled with spaces to its column's width: in front if it has only
    digits, else behind. A cell longer than its width is cut to it, "~" being the last character of what
    remains. Columns for which there are no cells are filled with spaces; there are never more cells than
    widths, and widths are at least 1. Without columns the row is "".

    >>> table_row(["pears", "12", "ripening"], [6, 4, 5])
    'pears |  12|ripe~'
    """
    shown = []
    for index, width in enumerate(widths):
        cell = cells[index] if index < len(cells) else ""
        if len(cell) > width:
            cell = cell[: width - 1] + "~"
        shown.append(cell.rjust(width) if cell.isdigit() else cell.ljust(width))
    return "|".join(shown)


@cases(
    (["a = 1", "[s]", "a=2"],),
    ([],),
    (["", "; x = 1", "[s]"],),
    (["[s]", " deep ", "k = v=w"],),
    (["k=1", "k = 2", "k2 ="],),
    (["[s]", "a=1", "[t]", "a=2", "[s]", "a=3"],),
)
def flat_settings(lines: list[str]) -> dict[str, str]:
    """The settings in the lines. Spaces at both ends of lines, keys and values are dropped; empty lines and
    lines that start with ";" are skipped. A line "[section]" puts "section." in front of the keys after it,
    until the next such line. Any other line is "key = value", parted at the first "=", or a key alone,
    whose value is "on"; a key set again takes the later value, and without settings the dict is empty.

    >>> flat_settings(["debug", "; paths", "[log]", "file = a.txt", "level=3"])
    {'debug': 'on', 'log.file': 'a.txt', 'log.level': '3'}
    """
    settings = {}
    prefix = ""
    for line in lines:
        line = line.strip()
        if not line or line.startswith(";"):
            continue
        if line.startswith("["):
            prefix = line[1:-1] + "."
        else:
            key, equals, value = line.partition("=")
            settings[prefix + key.strip()] = value.strip() if equals else "on"
    return settings


@cases(
    (["--a", "b"],),
    ([],),
    (["--a=1", "--a=2=3", "--a="],),
    (["--no-color", "--color"],),
    (["x", "--", "--a", "--"],),
    (["--no-b=yes", "-v"],),
    (["--q", "--no-q", "z"],),
)
def parsed_options(arguments: list[str]) -> tuple[dict[str, str | bool], list[str]]:
    """The options by name, and the list of the other arguments in order; either may be empty.
    "--name=value", parted at the first "=", sets the name to the value, a string; without "=", "--no-name"
    sets the name to False and any other "--name" sets it to True; a later setting wins. The first "--"
    alone is dropped, and all arguments after it are others, as are those that do not start with "--".

    >>> parsed_options(["--fast", "in.txt", "--size=4", "--no-log"])
    ({'fast': True, 'size': '4', 'log': False}, ['in.txt'])
    """
    options = {}
    for index, argument in enumerate(arguments):
        if argument == "--":
            others = [word for word in arguments[:index] if not word.startswith("--")]
            return (options, others + arguments[index + 1 :])
        if not argument.startswith("--"):
            continue
        name, equals, value = argument[2:].partition("=")
        if not equals:
            value = not name.startswith("no-")
            name = name.removeprefix("no-")
        options[name] = value
    return (options, [word for word in arguments if not word.startswith("--")])


@cases(
    (["aa", "bb", "cc"], 5),
    ([], 9),
    (["abcdef"], 3),
    (["a", "abcdef", "b"], 4),
    (["aa", "bb", "c"], 4),
    (["ab", "c", "d", "e"], 4),
)
def hanging_lines(words: list[str], width: int) -> list[str]:
    """The words set in lines of at most width characters, single spaces between the words of a line. Every
    line but the first starts with two spaces, which count towards its width. Each line takes as many words
    as fit; a word too long for its line stands alone there and overruns; no words give no lines.

    >>> hanging_lines(["one", "two", "three", "four"], 8)
    ['one two', '  three', '  four']
    """
    lines = []
    for word in words:
        if lines and len(lines[-1]) + 1 + len(word) <= width:
            lines[-1] += " " + word
        else:
            lines.append("  " + word if lines else word)
    return lines


@cases((59,), (0,), (3600,), (3605,), (93659,), (-75,), (172800,))
def rough_duration(seconds: int) -> str:
    """The duration in days, hours, minutes and seconds ("d", "h", "m", "s"), reduced to its largest unit
    that is not zero and the next smaller unit, joined by a space; the smaller of the two is left out if it
    is zero, and all units below it are dropped. Zero is "0s"; a negative duration is written like the
    positive one with "-" in front.

    >>> rough_duration(3725)
    '1h 2m'
    >>> rough_duration(-60)
    '-1m'
    """
    rest = abs(seconds)
    parts = []
    for unit, size in (("d", 86400), ("h", 3600), ("m", 60), ("s", 1)):
        count, rest = divmod(rest, size)
        if count or parts:
            parts.append((count, unit))
    shown = " ".join(f"{count}{unit}" for count, unit in parts[:2] if count) or "0s"
    return "-" + shown if seconds < 0 else shown


@cases(("-12",), ("x_1",), ("",), ("1x",), ('"a b"',), ('"',), ("-",))
def token_kind(token: str) -> str:
    """The kind of a token: "empty" for the empty string; "number" for one or more digits, perhaps with one
    "-" in front; "name" for letters, digits and underscores of which the first is no digit; "text" for at
    least two characters of which the first and the last are double quotes; "other" for everything else.

    >>> token_kind("total")
    'name'
    >>> token_kind("+")
    'other'
    """
    if not token:
        return "empty"
    if token.removeprefix("-").isdigit():
        return "number"
    if token.isidentifier():
        return "name"
    if len(token) >= 2 and token[0] == '"' and token[-1] == '"':
        return "text"
    return "other"
