"""Records and structures: dicts, tables, ranks, grids, graphs, trees, queues, schedules, inventories."""

from . import cases


@cases(
    ([("nut", 4), ("bolt", 2), ("nut", -4)],),
    ([],),
    ([("nut", 0)],),
    ([("nut", -3), ("nut", 1)],),
    ([("a", 1), ("b", 2), ("a", 1), ("b", -1)],),
)
def net_stock(movements: list[tuple[str, int]]) -> dict[str, int]:
    """Net quantity per item from (item, change) movements; items whose net is zero are left out.

    A net may be negative. No movements give an empty dict.

    >>> net_stock([("pen", 5), ("ink", 2), ("pen", -1), ("ink", -2)])
    {'pen': 4}
    """
    totals: dict[str, int] = {}
    for item, change in movements:
        totals[item] = totals.get(item, 0) + change
    return {item: total for item, total in totals.items() if total != 0}


@cases(
    ({"name": "Bo", "age": 0}, ["name", "age"]),
    ({"name": "", "age": None}, ["age", "name", "city"]),
    ({}, ["b", "a"]),
    ({"x": 1}, []),
    ({"x": False, "y": None}, ["y", "x"]),
)
def missing_fields(record: dict, required: list[str]) -> list[str]:
    """The required field names, in their given order, that the record lacks or holds as None or as "".

    The values 0 and False count as present. With nothing missing the list is empty.

    >>> missing_fields({"id": 7, "mail": ""}, ["mail", "id", "phone"])
    ['mail', 'phone']
    """
    missing = []
    for field in required:
        if record.get(field) in (None, ""):
            missing.append(field)
    return missing


@cases(
    ([[1, 9], [5, 9], [5, 2]],),
    ([],),
    ([[4]],),
    ([[-3, -1, 0], [-2, -1, -5]],),
    ([[0, 0], [0, 0]],),
)
def column_peak_rows(grid: list[list[int]]) -> list[int]:
    """For each column of a rectangular grid, the index of the row that holds its largest value.

    On a tie the upper row counts. An empty grid gives an empty list.

    >>> column_peak_rows([[1, 8, 3], [4, 2, 3]])
    [1, 0, 0]
    """
    peaks = []
    for column in zip(*grid, strict=True):
        peaks.append(column.index(max(column)))
    return peaks


@cases(
    ([[1, 2, 3], [4, 5, 6], [7, 8, 9]],),
    ([],),
    ([[5]],),
    ([[1, 2, 3]],),
    ([[1, -1], [2, -2], [3, -3], [4, -5]],),
    ([[1], [2], [3]],),
    ([[1, 1, 1, 1], [1, 50, 60, 1], [1, 1, 1, 1]],),
)
def border_surplus(grid: list[list[int]]) -> int:
    """Sum of a rectangular grid's border cells minus the sum of its other cells.

    Border cells are those in the first or last row or the first or last column; each cell counts once.
    An empty grid gives 0.

    >>> border_surplus([[1, 1, 1], [1, 4, 2], [1, 1, 1]])
    5
    """
    total = 0
    for r, row in enumerate(grid):
        for c, value in enumerate(row):
            on_border = r in (0, len(grid) - 1) or c in (0, len(row) - 1)
            total += value if on_border else -value
    return total


@cases(
    ([("ann", "home"), ("bob", "home"), ("bob", "shop")],),
    ([],),
    ([("ann", "x"), ("ann", "x")],),
    ([("z", "p"), ("y", "q"), ("z", "q"), ("y", "p"), ("a", "r")],),
)
def first_visitors(visits: list[tuple[str, str]]) -> dict[str, str]:
    """For each page, the person who visited it first, from (person, page) visits in time order.

    No visits give an empty dict.

    >>> first_visitors([("cy", "faq"), ("di", "faq"), ("di", "news")])
    {'faq': 'cy', 'news': 'di'}
    """
    first: dict[str, str] = {}
    for person, page in visits:
        first.setdefault(page, person)
    return first


@cases(
    ({"a": 1, "b": 2}, {"a": 1, "b": 3}),
    ({}, {}),
    ({"a": None}, {}),
    ({"z": 1, "k": 2}, {"k": 3, "b": 0}),
    ({"a": [1, 2]}, {"a": [2, 1]}),
    ({"a": 1}, {"a": 1}),
)
def changed_fields(before: dict, after: dict) -> list[str]:
    """Names, in alphabetical order, of fields that differ in value or that only one of the two records has.

    A field held as None is not the same as a field left out. Equal records, also two empty ones, give an
    empty list.

    >>> changed_fields({"price": 5, "name": "cup"}, {"price": 6, "name": "cup", "colour": "red"})
    ['colour', 'price']
    """
    names = before.keys() | after.keys()
    return sorted(n for n in names if n not in before or n not in after or before[n] != after[n])


@cases(
    (["x.x", "..."],),
    ([],),
    (["x.x.x"],),
    ([".x", "x."],),
    (["."],),
    (["x..x", "xx.x"],),
)
def wedged_seats(rows: list[str]) -> int:
    """Number of free seats (".") that have a taken seat ("x") directly on both their left and right.

    A seat at the end of a row has no neighbour on that side, so it never counts. No rows give 0.

    >>> wedged_seats(["x.x.", "xx..x", "x.xx"])
    2
    """
    count = 0
    for row in rows:
        for i in range(1, len(row) - 1):
            if row[i - 1 : i + 2] == "x.x":
                count += 1
    return count


@cases(
    ({"milk": 1, "eggs": 12}, {"milk": 4, "eggs": 6}),
    ({}, {"salt": 2, "oil": 1}),
    ({"tea": 3}, {}),
    ({"tea": 3}, {"tea": 3}),
    ({"b": -1, "a": 0}, {"b": 1, "a": 0, "c": 5}),
)
def reorder_list(stock: dict[str, int], minimums: dict[str, int]) -> list[tuple[str, int]]:
    """(item, quantity to buy) for each item whose stock is below its minimum, so as to reach that minimum.

    An item with no stock entry has stock 0; an item with no minimum is never bought. Sorted by item name;
    an empty list if nothing is short.

    >>> reorder_list({"soap": 2, "rope": 9}, {"soap": 5, "rope": 3, "glue": 1})
    [('glue', 1), ('soap', 3)]
    """
    orders = []
    for item in sorted(minimums):
        short = minimums[item] - stock.get(item, 0)
        if short > 0:
            orders.append((item, short))
    return orders


@cases(
    ([{"a": 1}, {"b": 2}],),
    ([],),
    ([{}],),
    ([{"a": 1, "b": 0}, {"a": 2}, {}],),
    ([{"k": "x"}, {"k": "y"}],),
)
def records_to_columns(records: list[dict]) -> dict[str, list]:
    """Table as a dict from field name to the list of its values, one value a record, in record order.

    Every field that occurs in any record has a column; where a record lacks the field the value is None. No
    records, or only empty ones, give an empty dict.

    >>> records_to_columns([{"id": 1, "tag": "p"}, {"id": 2}])
    {'id': [1, 2], 'tag': ['p', None]}
    """
    fields = {field: None for record in records for field in record}
    return {field: [record.get(field) for record in records] for field in fields}


@cases(
    ({"ann": "bob", "bob": "cat"}, "bob"),
    ({"ann": "bob", "bob": "cat"}, "ann"),
    ({"ann": "bob"}, "bob"),
    ({}, "zed"),
    ({"a": "b", "c": "b", "b": "d", "d": "e"}, "c"),
)
def chain_of_command(boss_of: dict[str, str], person: str) -> list[str]:
    """The bosses above a person, nearest first, up to the one who has no boss.

    The person is not in the list. A person who is not a key of boss_of has no boss, so gets an empty list.
    Nobody is above themselves.

    >>> chain_of_command({"kim": "lou", "lou": "max", "pat": "max"}, "kim")
    ['lou', 'max']
    """
    chain = []
    while person in boss_of:
        person = boss_of[person]
        chain.append(person)
    return chain


@cases(
    ([[1, 2, 3], [4, 5, 6]],),
    ([],),
    ([[7]],),
    ([[1, -1], [-2, 2], [0, 0]],),
    ([[5], [6]],),
)
def with_totals(grid: list[list[int]]) -> list[list[int]]:
    """Copy of a rectangular grid with each row's sum added at its end, and below it one row of column sums.

    That last row ends with the sum of all cells. An empty grid gives an empty list.

    >>> with_totals([[1, 2], [3, 4]])
    [[1, 2, 3], [3, 4, 7], [4, 6, 10]]
    """
    if not grid:
        return []
    wide = [row + [sum(row)] for row in grid]
    return wide + [[sum(column) for column in zip(*wide, strict=True)]]


@cases(
    ([{"city": "Rome"}, {"city": None}, {"city": None}], "city"),
    ([{"d": None}, {"d": 0}, {"d": None}], "d"),
    ([], "x"),
    ([{"x": None}], "x"),
    ([{"x": 1, "y": None}, {"x": None, "y": 5}], "x"),
)
def filled_down(rows: list[dict], field: str) -> list[dict]:
    """Copies of the rows in which a None in the field becomes the field's last non-None value above it.

    A None with only None (or nothing) above it stays None. Every row has the field; other fields stay as
    they are. No rows give an empty list.

    >>> filled_down([{"day": "Mon", "n": 1}, {"day": None, "n": None}], "day")
    [{'day': 'Mon', 'n': 1}, {'day': 'Mon', 'n': None}]
    """
    last = None
    filled = []
    for row in rows:
        if row[field] is not None:
            last = row[field]
        filled.append({**row, field: last})
    return filled


@cases(
    (["a.txt", "b.txt", "a.txt"], 2),
    ([], 3),
    (["x", "y", "z"], 2),
    (["x", "x", "x"], 5),
    (["x", "y"], 0),
    (["p", "q", "p", "r", "q"], 3),
)
def recent_files(opened: list[str], size: int) -> list[str]:
    """The files opened, each once, ordered by its last opening with the latest first, at most size of them.

    The list opened is in time order, oldest first. Size 0 or no files give an empty list.

    >>> recent_files(["cv.doc", "tax.xls", "cv.doc", "map.png"], 2)
    ['map.png', 'cv.doc']
    """
    recent = dict.fromkeys(reversed(opened))
    return list(recent)[:size]


@cases(
    ({"ann": 5, "bob": 7, "cat": 5},),
    ({},),
    ({"solo": 0},),
    ({"a": -1, "b": -1, "c": -2},),
    ({"a": 1, "b": 2, "c": 3},),
    ({"a": 4, "b": 4, "c": 4},),
)
def rank_labels(scores: dict[str, int]) -> dict[str, str]:
    """Rank of each name as text, where the rank is one more than the number of names with a higher score.

    A rank shared by two or more names has "=" after its number. No scores give an empty dict.

    >>> rank_labels({"kay": 9, "lee": 8, "moe": 9, "ned": 6})
    {'kay': '1=', 'lee': '3', 'moe': '1=', 'ned': '4'}
    """
    values = list(scores.values())
    labels = {}
    for name, score in scores.items():
        rank = 1 + sum(value > score for value in values)
        labels[name] = f"{rank}=" if values.count(score) > 1 else str(rank)
    return labels


@cases(
    ([("FR", "gold"), ("DE", "silver"), ("DE", "silver")],),
    ([],),
    ([("B", "bronze"), ("A", "bronze")],),
    ([("X", "silver"), ("X", "bronze"), ("Y", "silver"), ("Y", "bronze"), ("Y", "bronze")],),
    ([("P", "bronze"), ("P", "gold"), ("Q", "gold"), ("Q", "silver")],),
)
def medal_table(medals: list[tuple[str, str]]) -> list[str]:
    """The countries in (country, medal) pairs, best first; a medal is "gold", "silver" or "bronze".

    More gold medals go first, then on a tie more silver, then more bronze, then alphabetical order.
    Each country appears once; no medals give an empty list.

    >>> medal_table([("IT", "bronze"), ("ES", "silver"), ("IT", "bronze"), ("NO", "gold")])
    ['NO', 'ES', 'IT']
    """
    kinds = ["gold", "silver", "bronze"]
    counts: dict[str, list[int]] = {}
    for country, medal in medals:
        counts.setdefault(country, [0, 0, 0])[kinds.index(medal)] -= 1
    return sorted(counts, key=lambda country: (counts[country], country))


@cases(
    ({"north": {"tea": 3, "jam": 5}, "south": {"tea": 2}},),
    ({},),
    ({"empty": {}},),
    ({"b": {"x": 1}, "a": {"x": 1}},),
    ({"b": {"x": 0, "y": 9}, "a": {"x": 1, "y": 8}, "c": {"y": 8}},),
)
def cheapest_shops(price_lists: dict[str, dict[str, int]]) -> dict[str, str]:
    """For each item in any shop's price list, the shop that sells it for the least.

    On a tie the shop whose name is first in alphabetical order is taken. No items at all give an empty dict.

    >>> cheapest_shops({"west": {"bun": 4, "pie": 7}, "east": {"bun": 4, "pie": 9}})
    {'bun': 'east', 'pie': 'west'}
    """
    best: dict[str, tuple[int, str]] = {}
    for shop, prices in price_lists.items():
        for item, price in prices.items():
            best[item] = min(best.get(item, (price, shop)), (price, shop))
    return {item: shop for item, (_, shop) in best.items()}


@cases(
    ([(9, 10), (12, 13)], 8, 17),
    ([], 8, 12),
    ([(8, 12)], 8, 12),
    ([(10, 11), (8, 9), (9, 10)], 8, 12),
    ([(9, 14), (10, 11), (15, 16)], 9, 17),
    ([(3, 5)], 0, 5),
)
def free_slots(bookings: list[tuple[int, int]], opening: int, closing: int) -> list[tuple[int, int]]:
    """The (start, end) stretches between opening and closing that no booking covers, in time order.

    Bookings are (start, end) within the opening hours, in any order, and may overlap. Bookings that touch
    leave no stretch between them. No bookings give one stretch from opening to closing.

    >>> free_slots([(14, 15), (10, 12), (11, 13)], 9, 18)
    [(9, 10), (13, 14), (15, 18)]
    """
    free = []
    busy_until = opening
    for start, end in sorted(bookings):
        if start > busy_until:
            free.append((busy_until, start))
        busy_until = max(busy_until, end)
    if busy_until < closing:
        free.append((busy_until, closing))
    return free


@cases(
    ([["a", "b"], ["c"]],),
    ([],),
    ([[], ["x", "y"], []],),
    ([["a", "b", "c"], ["d"], ["e", "f"]],),
    ([["only"]],),
)
def serve_in_turns(queues: list[list[str]]) -> list[str]:
    """The order of service when in each round every queue, from first to last, has its front person served.

    An empty queue is skipped. Rounds go on until all queues are empty. No queues give an empty list.

    >>> serve_in_turns([["ida", "jan"], ["kit"], ["lea", "mia", "nan"]])
    ['ida', 'kit', 'lea', 'jan', 'mia', 'nan']
    """
    served = []
    for turn in range(max(map(len, queues), default=0)):
        for queue in queues:
            if turn < len(queue):
                served.append(queue[turn])
    return served


@cases(
    ({"hall": ["bath"], "attic": ["hall"], "bath": []}, "hall"),
    ({"a": []}, "a"),
    ({"a": ["b"], "b": ["a"], "d": ["c"], "c": ["d"]}, "a"),
    ({"a": ["b"], "b": ["c"], "c": ["a"]}, "b"),
    ({"p": [], "r": ["p"], "q": ["r"]}, "r"),
)
def locked_out_rooms(doors: dict[str, list[str]], start: str) -> list[str]:
    """Rooms, in alphabetical order, that cannot be reached from the start room.

    Each room is a key; its list names the rooms its doors lead to. A door works in that direction only. The
    start itself is reached; an empty list if all rooms are.

    >>> locked_out_rooms({"den": ["loft"], "loft": [], "yard": ["den"], "shed": ["yard"]}, "den")
    ['shed', 'yard']
    """
    reached = {start}
    waiting = [start]
    while waiting:
        for room in doors[waiting.pop()]:
            if room not in reached:
                reached.add(room)
                waiting.append(room)
    return sorted(room for room in doors if room not in reached)


@cases(
    ([(5, 10), (5, 20)], 7),
    ([(5, 10)], 0),
    ([], 0),
    ([(2, 3), (1, 100)], 3),
    ([(1, 4)], 2),
    ([], 1),
    ([(0, 9), (3, 2)], 3),
)
def cost_of_sale(purchases: list[tuple[int, int]], sold: int) -> int | None:
    """Cost of the units sold, when units leave the store in the order in which they were bought.

    Purchases are (units, price of one unit), the oldest first. Returns None when more are sold than were
    bought, and 0 when none are sold.

    >>> cost_of_sale([(10, 2), (10, 3)], 12)
    26
    """
    cost = 0
    for units, price in purchases:
        taken = min(units, sold)
        cost += taken * price
        sold -= taken
    return cost if sold == 0 else None


@cases(
    ([[1, 0], [0, 2], [0, 0]],),
    ([],),
    ([[3], [0], [4], [0]],),
    ([[0, 0], [0, 0]],),
    ([[-1, 5], [0, 0]],),
    ([[1, 2, 3]],),
)
def settled_grid(grid: list[list[int]]) -> list[list[int]]:
    """Rectangular grid after the nonzero numbers of each column have dropped to its bottom; 0 is empty space.

    The numbers of a column keep their order from top to bottom. An empty grid gives an empty list.

    >>> settled_grid([[7, 0, 1], [8, 4, 0], [0, 0, 0]])
    [[0, 0, 0], [7, 0, 0], [8, 4, 1]]
    """
    columns = []
    for column in zip(*grid, strict=True):
        solid = [value for value in column if value != 0]
        columns.append([0] * (len(column) - len(solid)) + solid)
    return [list(row) for row in zip(*columns, strict=True)]


@cases(
    ({"post1": ["tea", "milk"], "post2": ["milk"]},),
    ({},),
    ({"b": ["x"], "a": ["x"], "c": ["x", "y"]},),
    ({"a": ["x", "x"]},),
    ({"b": ["p", "q"], "a": ["q", "p"], "c": []},),
)
def shared_tags(tags_of: dict[str, list[str]]) -> dict[str, list[str]]:
    """For each tag that at least two articles have, those articles in alphabetical order.

    The keys are articles and the values their tags; a tag repeated within one article counts once. No such
    tags give an empty dict.

    >>> shared_tags({"soup": ["hot", "veg"], "salad": ["veg"], "chili": ["hot"], "cake": ["sweet"]})
    {'hot': ['chili', 'soup'], 'veg': ['salad', 'soup']}
    """
    groups: dict[str, list[str]] = {}
    for article in sorted(tags_of):
        for tag in dict.fromkeys(tags_of[article]):
            groups.setdefault(tag, []).append(article)
    return {tag: articles for tag, articles in groups.items() if len(articles) > 1}


@cases(
    ([[1, 2, 3], [4, 5, 6], [7, 8, 9]],),
    ([],),
    ([[5]],),
    ([[1, 2], [3, 4]],),
    ([[1, 1, 1, 1], [1, 2, 2, 1], [1, 2, -2, 1], [1, 1, 1, 0]],),
)
def ring_sums(grid: list[list[int]]) -> list[int]:
    """Sums of the concentric square rings of an n by n grid, from the outer ring inwards.

    The middle cell of an odd-sized grid is a ring of its own. An empty grid gives an empty list.

    >>> ring_sums([[1, 0, 2], [0, 9, 0], [3, 0, 4]])
    [10, 9]
    """
    n = len(grid)
    sums = [0] * ((n + 1) // 2)
    for r in range(n):
        for c in range(n):
            sums[min(r, c, n - 1 - r, n - 1 - c)] += grid[r][c]
    return sums


@cases(
    ([(1, 1, "a"), (1, 2, "b")],),
    ([],),
    ([(7, 1, "x"), (7, 2, None)],),
    ([(7, 2, None), (7, 1, "x"), (8, 0, "y")],),
    ([(3, 5, "old"), (3, 5, "new"), (3, 4, "older")],),
    ([(3, 5, "old"), (3, 5, None), (4, 1, "")],),
)
def latest_versions(records: list[tuple[int, int, str | None]]) -> dict[int, str]:
    """For each id, the text of its record of the highest version, from (id, version, text) records.

    Of equal versions the later record in the list counts. When the chosen text is None the id was deleted
    and is left out; an empty text is kept. No records give an empty dict.

    >>> latest_versions([(1, 2, "two"), (1, 1, "one"), (2, 1, "cat"), (2, 2, None)])
    {1: 'two'}
    """
    best: dict[int, tuple[int, str | None]] = {}
    for key, version, text in records:
        if key not in best or version >= best[key][0]:
            best[key] = (version, text)
    return {key: text for key, (_, text) in best.items() if text is not None}


@cases(
    ({"ann": ["bob"], "bob": ["ann", "cat"], "cat": ["bob"]}, "ann"),
    ({"ann": []}, "ann"),
    ({"a": ["b"], "b": ["a"]}, "b"),
    ({"a": ["b", "c"], "b": ["a", "c", "e"], "c": ["a", "b", "d"], "d": ["c"], "e": ["b"]}, "a"),
    ({"a": ["b", "c"], "b": ["a", "x", "y"], "c": ["a", "y"], "x": ["b"], "y": ["b", "c"]}, "a"),
)
def suggested_friends(friends: dict[str, list[str]], person: str) -> list[tuple[str, int]]:
    """(name, number of shared friends) of each non-friend who has a friend in common with the person.

    The person is not suggested. Every friendship is listed for both people. Most shared friends come first,
    ties in alphabetical order; nobody to suggest gives an empty list.

    >>> suggested_friends({"uma": ["tom", "sam"], "tom": ["uma", "lo"], "sam": ["uma"], "lo": ["tom"]}, "sam")
    [('tom', 1)]
    """
    shared: dict[str, int] = {}
    for friend in friends[person]:
        for other in friends[friend]:
            if other != person and other not in friends[person]:
                shared[other] = shared.get(other, 0) + 1
    return sorted(shared.items(), key=lambda pair: (-pair[1], pair[0]))


@cases(
    ([[1, 2], [3, 0]],),
    ([],),
    ([[5]],),
    ([[4, 4, 1]],),
    ([[9, 1, 9], [1, 1, 1], [9, 1, 9]],),
    ([[-2, -1], [-4, -3]],),
    ([[1, 5], [5, 1]],),
)
def hilltops(heights: list[list[int]]) -> list[tuple[int, int]]:
    """The (row, column) positions, counted from 0, of cells strictly higher than all their direct neighbours.

    Direct neighbours are the cells above, below, left and right that exist in the rectangular grid. The
    order is row by row from the top, each from left to right; a grid of one cell has that cell as a
    hilltop. An empty grid gives an empty list.

    >>> hilltops([[3, 1, 2], [0, 1, 2], [4, 1, 0]])
    [(0, 0), (2, 0)]
    """
    tops = []
    for r, row in enumerate(heights):
        for c, height in enumerate(row):
            near = [(r - 1, c), (r + 1, c), (r, c - 1), (r, c + 1)]
            inside = [(i, j) for i, j in near if 0 <= i < len(heights) and 0 <= j < len(row)]
            if all(height > heights[i][j] for i, j in inside):
                tops.append((r, c))
    return tops


@cases(
    ([("ann", 3), ("bob", 5), ("cat", 4), ("dan", 1)],),
    ([],),
    ([("a", 2), ("b", 2), ("c", 1), ("d", 1), ("e", 0)],),
    ([("z", 1), ("y", 1)],),
    ([("p", -1), ("q", -2), ("r", -3), ("s", -4), ("t", -3)],),
)
def podium(results: list[tuple[str, int]]) -> list[str]:
    """Names on the steps of a podium, for the three highest different scores, the highest first.

    A step is the names of all who have that score, in alphabetical order, joined by "+". With fewer than
    three different scores there are fewer steps; no results give an empty list.

    >>> podium([("ola", 7), ("eva", 9), ("ari", 7), ("lin", 2), ("bea", 1)])
    ['eva', 'ari+ola', 'lin']
    """
    steps = []
    for score in sorted({score for _, score in results}, reverse=True)[:3]:
        steps.append("+".join(sorted(name for name, points in results if points == score)))
    return steps


@cases(
    ({"tea": {"leaf": 2, "cup": 1}}, "tea", 3),
    ({"bike": {"wheel": 2, "bell": 1}, "wheel": {"spoke": 30, "tyre": 1}}, "bike", 2),
    ({}, "nail", 5),
    ({"a": {"b": 2, "c": 1}, "b": {"c": 3}}, "a", 1),
    ({"a": {"b": 4}}, "b", 2),
)
def raw_parts(recipes: dict[str, dict[str, int]], product: str, count: int) -> dict[str, int]:
    """Total of each raw part needed to make count pieces of the product, for a count of at least 1.

    A recipe gives the parts of one piece and how many of each. Parts that have a recipe are made from their
    own parts in turn; those without one are raw. A product without a recipe is itself the only raw part.

    >>> raw_parts({"desk": {"leg": 4, "top": 1}, "leg": {"nut": 2}, "top": {"nut": 3, "wood": 1}}, "desk", 2)
    {'nut': 22, 'wood': 2}
    """
    if product not in recipes:
        return {product: count}
    totals: dict[str, int] = {}
    for part, each in recipes[product].items():
        for raw, amount in raw_parts(recipes, part, each * count).items():
            totals[raw] = totals.get(raw, 0) + amount
    return totals


@cases(
    ({"a": 1, "b": {"c": 2, "d": 3}}, {"b": {"c": 9}}),
    ({"a": 1}, {"a": None}),
    ({}, {"x": {"y": 1}}),
    ({"a": {"b": 1}}, {"a": 5, "z": None}),
    ({"a": {"b": 1, "c": 2}, "k": 0}, {"a": {"b": None, "d": 4}}),
    ({"a": 1}, {}),
)
def patched_settings(settings: dict, patch: dict) -> dict:
    """New settings: those given, changed by the patch.

    A patch value of None removes the key (or does nothing if there is no such key). Where both hold a dict
    under a key, that dict is patched in the same way. Any other patch value, which contains no None, is set
    as it is.

    >>> patched_settings({"lang": "en", "ui": {"dark": True, "zoom": 2}}, {"lang": None, "ui": {"zoom": 3}})
    {'ui': {'dark': True, 'zoom': 3}}
    """
    result = dict(settings)
    for key, value in patch.items():
        if value is None:
            result.pop(key, None)
        elif isinstance(value, dict) and isinstance(result.get(key), dict):
            result[key] = patched_settings(result[key], value)
        else:
            result[key] = value
    return result


@cases(
    ({"user": {"tags": ["a", "b"]}}, "user.tags.1"),
    ({"user": {"tags": ["a", "b"]}}, "user.tags.2"),
    ({"a": 0}, "a"),
    ({"a": 5}, "a.b"),
    ({"rows": [{"id": 4}, {"id": 8}]}, "rows.1.id"),
    ({}, "x"),
    ({"rows": [1, 2]}, "rows.first"),
)
def value_at_path(data: dict, path: str) -> int | str | dict | list | None:
    """The value in nested dicts and lists at a path whose steps are separated by ".".

    In a dict a step is a key. In a list a step made only of digits is an index counted from 0. Returns None
    when a step finds nothing: no such key, index too large, a step other than digits in a list, or a
    further step after a value that is neither dict nor list.

    >>> value_at_path({"order": {"lines": [{"sku": "K1"}, {"sku": "K2"}]}}, "order.lines.0.sku")
    'K1'
    >>> value_at_path({"order": {"lines": []}}, "order.total") is None
    True
    """
    for step in path.split("."):
        if isinstance(data, dict) and step in data:
            data = data[step]
        elif isinstance(data, list) and step.isdigit() and int(step) < len(data):
            data = data[int(step)]
        else:
            return None
    return data


@cases(
    (["join ann", "join bob", "serve"],),
    ([],),
    (["serve", "join x"],),
    (["join a", "vip b", "vip c"],),
    (["join a", "join b", "join c", "leave b", "leave z"],),
    (["join a", "join b", "join a", "vip b", "serve"],),
)
def waiting_line(events: list[str]) -> list[str]:
    """People who still wait, front first, after the events, starting from an empty line.

    "join X" puts X at the back and "vip X" at the front; both do nothing if X already waits. "leave X"
    takes X out if X waits. "serve" takes out the person at the front, if any; an empty line at the end
    gives an empty list.

    >>> waiting_line(["join meg", "join noa", "vip oli", "leave meg", "join pia"])
    ['oli', 'noa', 'pia']
    """
    line: list[str] = []
    for event in events:
        action, _, name = event.partition(" ")
        if action == "serve":
            line = line[1:]
        elif action == "leave":
            line = [other for other in line if other != name]
        elif name not in line:
            line = line + [name] if action == "join" else [name] + line
    return line


@cases(
    ([("ann", 30, ["ann", "bob", "cat"])],),
    ([],),
    ([("ann", 10, ["bob"]), ("bob", 10, ["ann"])],),
    ([("ann", 20, ["ann", "bob"]), ("bob", 6, ["ann", "bob", "cat"])],),
    ([("dan", 8, ["eve", "fay"]), ("eve", 5, ["eve"])],),
)
def trip_balances(expenses: list[tuple[str, int, list[str]]]) -> dict[str, int]:
    """What each person is owed (positive) or owes (negative) after expenses of (payer, amount, sharers).

    The payer gets the amount as credit, and each sharer is charged an equal part of it; amounts always
    divide evenly. The payer is charged only if among the sharers. People whose balance is 0 are left out,
    so no expenses give an empty dict.

    >>> trip_balances([("kim", 12, ["kim", "lou", "max"]), ("lou", 4, ["max"])])
    {'kim': 8, 'max': -8}
    """
    balance: dict[str, int] = {}
    for payer, amount, sharers in expenses:
        balance[payer] = balance.get(payer, 0) + amount
        for person in sharers:
            balance[person] = balance.get(person, 0) - amount // len(sharers)
    return {person: value for person, value in balance.items() if value != 0}


@cases(
    ({"": ["docs", "a.txt"], "docs": ["b.txt"]}, {"a.txt": 5, "b.txt": 7}, ""),
    ({"": []}, {}, ""),
    ({"x": ["y", "z"], "y": ["f"], "z": ["g", "h"]}, {"f": 1, "g": 2, "h": 0}, "z"),
    ({"x": ["y"], "y": ["z", "f"], "z": ["g"]}, {"f": 1, "g": 20}, "x"),
    ({"x": ["f"]}, {"f": 3}, "f"),
)
def folder_size(contents: dict[str, list[str]], sizes: dict[str, int], name: str) -> int:
    """Total size of the files in the folder with that name, in its subfolders, and so on down.

    Keys of contents are folders, each with the names of the folders and files in it; keys of sizes are files.
    The size of an empty folder is 0. If name is a file, its own size is returned.

    >>> folder_size({"top": ["pics", "todo"], "pics": ["cat", "dog"]}, {"todo": 1, "cat": 4, "dog": 6}, "top")
    11
    """
    if name in sizes:
        return sizes[name]
    return sum(folder_size(contents, sizes, child) for child in contents[name])


@cases(
    ({"book": ["part", "index"], "part": ["page"]}, "book"),
    ({}, "lone"),
    ({"r": ["b", "a"]}, "r"),
    ({"r": ["a", "b"], "a": ["c"], "b": ["d", "e"], "e": ["f"]}, "r"),
    ({"r": ["a", "b"], "a": ["c"], "b": ["d", "e"], "e": ["f"]}, "b"),
)
def numbered_outline(children: dict[str, list[str]], root: str) -> list[str]:
    """Lines such as "2.1 name" for all nodes below the root, which itself gets no line.

    The root's children are numbered 1, 2, ... in their order; a deeper node has its parent's number, a dot
    and its own place among its siblings. Each node's line is followed by those of all nodes below it. A
    node that is no key has no children; a root without any gives an empty list.

    >>> numbered_outline({"doc": ["intro", "usage"], "usage": ["setup", "run"]}, "doc")
    ['1 intro', '2 usage', '2.1 setup', '2.2 run']
    """

    def walk(node: str, prefix: str) -> list[str]:
        lines = []
        for place, child in enumerate(children.get(node, []), start=1):
            lines.append(f"{prefix}{place} {child}")
            lines.extend(walk(child, f"{prefix}{place}."))
        return lines

    return walk(root, "")


@cases(
    ([("a", "R1", 9, 11), ("b", "R1", 10, 12)],),
    ([],),
    ([("a", "R1", 9, 10), ("b", "R1", 10, 11)],),
    ([("a", "R1", 9, 12), ("b", "R2", 9, 12)],),
    ([("c", "R1", 9, 12), ("a", "R1", 10, 11), ("b", "R1", 11, 13)],),
    ([("a", "R1", 10, 11), ("b", "R1", 9, 10)],),
)
def room_clashes(bookings: list[tuple[str, str, int, int]]) -> list[tuple[str, str]]:
    """Pairs of names of bookings that overlap in the same room; a booking is (name, room, start, end).

    A booking that starts when another ends does not overlap it. In a pair the booking that comes first in
    the list is named first; pairs are ordered by the list position of their first booking, then of their
    second. No overlaps give an empty list.

    >>> room_clashes([("yoga", "A", 9, 11), ("chess", "B", 9, 10), ("choir", "A", 8, 10)])
    [('yoga', 'choir')]
    """
    clashes = []
    for i, (name, room, start, end) in enumerate(bookings):
        for other, other_room, other_start, other_end in bookings[i + 1 :]:
            if room == other_room and start < other_end and other_start < end:
                clashes.append((name, other))
    return clashes


@cases(
    ([5, 2, 4], 2),
    ([], 3),
    ([7], 1),
    ([1, 1, 1, 1], 2),
    ([3, 3, 3], 5),
    ([4, 6, 1, 1], 1),
    ([6, 2, 3, 1, 1], 3),
)
def counter_waits(durations: list[int], counters: int) -> list[int]:
    """Minutes each customer waits when all arrive at minute 0 and are served in order at several counters.

    Each customer, in the list's order, takes the counter that becomes free earliest and keeps it for that
    customer's duration in minutes. There is at least one counter; all are free at minute 0. No customers
    give an empty list.

    >>> counter_waits([8, 3, 2, 5], 2)
    [0, 0, 3, 5]
    """
    free_at = [0] * counters
    waits = []
    for duration in durations:
        earliest = min(free_at)
        waits.append(earliest)
        free_at[free_at.index(earliest)] = earliest + duration
    return waits


@cases(
    ({"nut": 10}, [("ann", "nut", 4), ("bob", "nut", 8)]),
    ({}, [("ann", "nut", 1)]),
    ({"nut": 3}, []),
    ({"nut": 5, "cap": 1}, [("a", "nut", 5), ("b", "nut", 1), ("c", "cap", 2)]),
    ({"nut": 4}, [("a", "nut", 4), ("b", "bolt", 2), ("a", "nut", 1)]),
)
def open_backorders(stock: dict[str, int], orders: list[tuple[str, str, int]]) -> list[tuple[str, str, int]]:
    """The (customer, item, missing quantity) of orders that stock cannot fill in full, in list order.

    Orders are (customer, item, quantity), filled one after another; each takes as much as is left of its
    item, and only the rest is missing. An item that is not in stock has quantity 0; if nothing is missing
    the list is empty.

    >>> open_backorders({"mug": 5}, [("ida", "mug", 3), ("jon", "mug", 4), ("kai", "jug", 2)])
    [('jon', 'mug', 2), ('kai', 'jug', 2)]
    """
    left = dict(stock)
    missing = []
    for customer, item, quantity in orders:
        given = min(quantity, left.get(item, 0))
        left[item] = left.get(item, 0) - given
        if given < quantity:
            missing.append((customer, item, quantity - given))
    return missing


@cases(
    ({"app": ["lib"], "lib": []},),
    ({},),
    ({"b": [], "a": []},),
    ({"a": ["b"], "b": ["a"], "c": []},),
    ({"d": ["b", "c"], "c": ["a"], "b": ["a"], "a": []},),
    ({"x": ["y"], "y": ["x"]},),
    ({"p": ["q"], "q": [], "r": ["q", "s"], "s": ["p"]},),
)
def build_waves(needs: dict[str, list[str]]) -> list[list[str]]:
    """Tasks in waves: each wave holds every task not yet done whose needed tasks were all done in earlier
    waves.

    The keys are all the tasks, the values the tasks each one needs. Names in a wave are in alphabetical
    order. Tasks that can never be done (they need each other, or need such tasks) are in no wave; without
    waves the list is empty.

    >>> build_waves({"paint": ["sand"], "sand": [], "wash": [], "sell": ["paint", "wash"]})
    [['sand', 'wash'], ['paint'], ['sell']]
    """
    done: set[str] = set()
    waves = []
    while True:
        wave = sorted(task for task in needs if task not in done and done.issuperset(needs[task]))
        if not wave:
            return waves
        waves.append(wave)
        done.update(wave)


@cases(
    ([("log", 5), ("map", 2)], 3),
    ([], 4),
    ([("a", 3)], 3),
    ([("a", 1), ("b", 1), ("c", 1)], 2),
    ([("a", 7), ("b", 4), ("c", 9)], 3),
    ([("a", 2), ("b", 6), ("c", 3)], 2),
    ([("a", 3), ("b", 1)], 3),
)
def finish_order(jobs: list[tuple[str, int]], slice_pages: int) -> list[str]:
    """Names of print jobs in the order they finish; a job is (name, pages), and has at least one page.

    The printer takes the job at the front of the queue and prints at most slice_pages pages of it. A job
    with pages left then goes to the back of the queue; otherwise it is finished. No jobs give an empty
    list.

    >>> finish_order([("thesis", 9), ("note", 2), ("flyer", 5)], 4)
    ['note', 'flyer', 'thesis']
    """
    queue = list(jobs)
    finished = []
    while queue:
        name, pages = queue.pop(0)
        if pages > slice_pages:
            queue.append((name, pages - slice_pages))
        else:
            finished.append(name)
    return finished


@cases(
    ([("ann", 0), ("ann", 5), ("ann", 20)], 10),
    ([], 5),
    ([("a", 3)], 0),
    ([("a", 0), ("b", 4), ("a", 8), ("b", 14)], 8),
    ([("a", 0), ("a", 10), ("a", 20)], 10),
    ([("b", 1), ("b", 1), ("b", 2)], 0),
)
def session_counts(clicks: list[tuple[str, int]], limit: int) -> dict[str, int]:
    """Number of sessions of each user, from (user, minute) clicks in time order.

    A user's first click starts a session. A later click starts a new one only if it comes more than limit
    minutes after the same user's previous click. No clicks give an empty dict.

    >>> session_counts([("sue", 0), ("tim", 10), ("sue", 31), ("tim", 40)], 30)
    {'sue': 2, 'tim': 1}
    """
    sessions: dict[str, int] = {}
    last: dict[str, int] = {}
    for user, minute in clicks:
        if user not in last or minute - last[user] > limit:
            sessions[user] = sessions.get(user, 0) + 1
        last[user] = minute
    return sessions
