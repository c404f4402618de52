"""Numbers and sequences: sums, windows, runs, digits, thresholds, money in cents, times in minutes."""

from . import cases


@cases(([500, 480, 450], 480), ([], 480), ([480], 480), ([10, 20, 30], 0), ([100, 700, 481], 480))
def overtime_minutes(worked: list[int], limit: int) -> int:
    """Total minutes worked beyond the daily limit.

    Each number is one day; a day at or under the limit adds nothing and makes up for no other day.
    No days give 0.

    >>> overtime_minutes([490, 470, 600], 480)
    130
    """
    total = 0
    for minutes in worked:
        total += max(0, minutes - limit)
    return total


@cases(([10, 8, 8, 12, 3], 4), ([], 1), ([7], 5), ([1, 2, 3, 4], 2), ([5, 5, 6], 1), ([-4, -2, -6, 0], 2))
def refill_count(levels: list[int], least: int) -> int:
    """How many levels are higher, by at least the given amount, than the level just before them.

    The amount is positive. Fewer than two levels give 0.

    >>> refill_count([90, 60, 95, 70, 72, 82], 10)
    2
    """
    count = 0
    for i in range(1, len(levels)):
        if levels[i] - levels[i - 1] >= least:
            count += 1
    return count


@cases((0,), (5,), (-5,), (1999,), (-12345,), (100,))
def cents_as_text(cents: int) -> str:
    """An amount in cents as text: whole euros, a point and always two digits of cents.

    A negative amount has a minus sign in front of the euros, also when these are 0.

    >>> cents_as_text(1205)
    '12.05'
    >>> cents_as_text(-70)
    '-0.70'
    """
    sign = "-" if cents < 0 else ""
    return f"{sign}{abs(cents) // 100}.{abs(cents) % 100:02d}"


@cases((0,), (59,), (1439,), (1440,), (-1,), (3000,))
def wall_clock(minutes: int) -> str:
    """The time of day, as "HH:MM" from "00:00" to "23:59", that many minutes after midnight.

    A count of a day (1440) or more runs on into the next days; a negative count goes back from midnight.

    >>> wall_clock(605)
    '10:05'
    >>> wall_clock(-30)
    '23:30'
    """
    minutes %= 24 * 60
    return f"{minutes // 60:02d}:{minutes % 60:02d}"


@cases((150, 420, 4), (9990, 5, 4), (7, 7, 3), (99, 0, 2), (0, 99, 2), (8, 3, 1))
def meter_used(before: int, after: int, digits: int) -> int:
    """Units counted by a meter between two readings.

    The meter shows the given number of digits and goes from all nines on to 0, at most once between
    the readings. If after is smaller than before, it has done so; equal readings mean 0 units.

    >>> meter_used(120, 150, 3)
    30
    >>> meter_used(995, 10, 3)
    15
    """
    if after < before:
        after += 10**digits
    return after - before


@cases(([7, 9, 8, 9],), ([],), ([5],), ([9, 7, 9, 3, 3, 8],), ([3, 3, 3, 3, 3],), ([-2, -9, 0, 5, 1],))
def judged_score(marks: list[int]) -> int:
    """Sum of the marks.

    If there are five or more marks, one highest and one lowest are left out: just one of each, even where
    several share that value. Fewer than five all count; no marks give 0.

    >>> judged_score([6, 9, 7, 9, 5])
    22
    >>> judged_score([6, 9])
    15
    """
    total = sum(marks)
    if len(marks) >= 5:
        total -= max(marks) + min(marks)
    return total


@cases(([10, 13, 9],), ([],), ([4],), ([5, 5, 5],), ([0, -7, 0],), ([1, 2, 4, 2],))
def biggest_jump_at(readings: list[int]) -> int:
    """Index of the reading that differs most, up or down, from the one just before it.

    On a tie the first such index. Fewer than two readings give -1.

    >>> biggest_jump_at([20, 21, 15, 18])
    2
    """
    best, best_at = -1, -1
    for i in range(1, len(readings)):
        jump = abs(readings[i] - readings[i - 1])
        if jump > best:
            best, best_at = jump, i
    return best_at


@cases((0, 6, 4), (1, 6, 4), (24, 6, 4), (25, 6, 4), (12, 6, 1), (100, 10, 3))
def boxes_and_pallets(items: int, per_box: int, boxes_per_pallet: int) -> tuple[int, int]:
    """The numbers of boxes and of pallets needed to ship the items, as a pair.

    The last box and the last pallet may be partly filled. No items need (0, 0).

    >>> boxes_and_pallets(50, 8, 3)
    (7, 3)
    """
    boxes = -(-items // per_box)
    return boxes, -(-boxes // boxes_per_pallet)


@cases(([5, 12, 10, 30], 10), ([], 10), ([1, 2], 10), ([10], 10), ([-5, 0, -1], -1), ([50, 60], 0))
def days_below(sales: list[int], target: int) -> list[int]:
    """Day numbers, counted from 1, of the days with sales strictly below the target.

    In order; an empty list if there are none.

    >>> days_below([40, 20, 35, 10], 30)
    [2, 4]
    """
    days = []
    for day, amount in enumerate(sales, 1):
        if amount < target:
            days.append(day)
    return days


@cases((500, [60, 120, 700]), (600, []), (700, [60, 700]), (701, [60, 700]), (1439, [0]), (0, [5, 1200]))
def minutes_to_next_bus(now: int, departures: list[int]) -> int:
    """Minutes to wait for the next bus.

    All times are minutes after midnight, 0 to 1439; the departures ascend and are the same every day, so
    after the last one the first one of tomorrow is next. A bus leaving right now means 0; no departures
    give -1.

    >>> minutes_to_next_bus(610, [480, 600, 660])
    50
    >>> minutes_to_next_bus(1400, [480, 600, 660])
    520
    """
    if not departures:
        return -1
    return min((time - now) % 1440 for time in departures)


@cases((0,), (7,), (-7,), (123,), (-98,), (1002,), (55,))
def last_digit_to_front(number: int) -> int:
    """The number with its last digit moved to the front of the others.

    The sign stays; zeros that come to stand in front vanish. A single digit stays as it is.

    >>> last_digit_to_front(4512)
    2451
    >>> last_digit_to_front(-130)
    -13
    """
    digits = str(abs(number))
    moved = int(digits[-1] + digits[:-1])
    return -moved if number < 0 else moved


@cases((100, 3), (0, 4), (7, 7), (5, 8), (1001, 2), (250, 1))
def split_bill(cents: int, people: int) -> list[int]:
    """What each person pays of a bill, in whole cents, as evenly as can be.

    The shares add up to the bill and differ by at most one cent; those who pay the extra cent come first.
    There is at least one person, and the bill is not negative.

    >>> split_bill(1000, 3)
    [334, 333, 333]
    """
    share, extra = divmod(cents, people)
    return [share + 1] * extra + [share] * (people - extra)


@cases((0,), (2,), (3,), (1998,), (-2,), (-3,), (-1998,))
def cash_rounded(cents: int) -> int:
    """The amount in cents rounded to the nearest multiple of five.

    A negative amount is rounded as the positive one, with the sign put back.

    >>> cash_rounded(1237)
    1235
    >>> cash_rounded(-48)
    -50
    """
    rounded = (abs(cents) + 2) // 5 * 5
    return -rounded if cents < 0 else rounded


@cases(([1, 2, 9, 1, 1, 1], 2), ([], 5), ([9, 8], 5), ([3], 3), ([1, 9, 1], 5), ([0, -1, 4, -3, -2], 0))
def longest_quiet_run(readings: list[int], limit: int) -> tuple[int, int]:
    """Start index and length of the longest run of consecutive readings that are at most the limit.

    Of equally long runs the first. If no reading is at most the limit, (-1, 0).

    >>> longest_quiet_run([7, 2, 3, 9, 1], 3)
    (1, 2)
    """
    best = (-1, 0)
    length = 0
    for i, reading in enumerate(readings):
        length = length + 1 if reading <= limit else 0
        if length > best[1]:
            best = (i - length + 1, length)
    return best


@cases(
    ([50, 81, 70, 59, 70, 80], 60, 80),
    ([], 10, 20),
    ([20, 10, 15, 20], 10, 20),
    ([15, 15], 10, 20),
    ([-1, 1, 0, -2], -1, 1),
)
def alarm_states(readings: list[int], low: int, high: int) -> list[bool]:
    """Whether the alarm is on after each reading.

    It is off at first, goes on at a reading of at least high, off at a reading of at most low, and keeps its
    state at any reading between; low is smaller than high. No readings give an empty list.

    >>> alarm_states([70, 95, 80, 40, 80], 50, 90)
    [False, True, True, False, False]
    """
    on = False
    states = []
    for reading in readings:
        if reading >= high:
            on = True
        elif reading <= low:
            on = False
        states.append(on)
    return states


@cases(([True, True, True],), ([],), ([False],), ([True, False, True, True],), ([False, False, True, False],))
def streak_points(hits: list[bool]) -> int:
    """Points for a row of throws.

    The first hit of an unbroken row of hits earns 1 point, the second 2, the third 3 and so on. A miss earns
    nothing, and the next hit is worth 1 again. No throws give 0.

    >>> streak_points([True, True, False, True])
    4
    """
    points = streak = 0
    for hit in hits:
        streak = streak + 1 if hit else 0
        points += streak
    return points


@cases((10, [4, 4, 4]), (10, []), (5, [9, -3, 4]), (8, [-5, 3, -9, 2]), (0, [3, 1]), (6, [6, -6, 7]))
def tank_and_spill(capacity: int, flows: list[int]) -> tuple[int, int]:
    """Final level of a tank that starts empty, and the total spilled, as a pair.

    A positive flow fills, and what goes above the capacity spills; a negative flow drains, and the level
    stops at 0. The flows come one after the other.

    >>> tank_and_spill(10, [7, 5, -4, -9, 3])
    (3, 2)
    """
    level = spilled = 0
    for flow in flows:
        level = max(0, level + flow)
        spilled += max(0, level - capacity)
        level = min(level, capacity)
    return level, spilled


@cases(([1, 5, 2, 4, 2, 4], 2), ([], 1), ([3, 4], 3), ([3, 4], 2), ([-5, -1, -1], 1), ([9, 0, 0, 9], 3))
def latest_best_window(counts: list[int], width: int) -> int:
    """Start index of the window of width consecutive counts with the largest sum.

    Of windows with equal sums the last. If there are fewer counts than the width, -1; the width is at
    least 1.

    >>> latest_best_window([1, 8, 1, 1, 8, 0], 2)
    3
    >>> latest_best_window([4, 4, 4], 2)
    1
    """
    best_at, best = -1, None
    for start in range(len(counts) - width + 1):
        total = sum(counts[start : start + width])
        if best is None or total >= best:
            best_at, best = start, total
    return best_at


@cases(([1, 2, 6, 4],), ([],), ([8],), ([3, 10],), ([0, 0, 1, 0],), ([5, -4, -3, 5],))
def smoothed(readings: list[int]) -> list[int]:
    """Each reading replaced by the mean, rounded down, of itself and its two neighbours.

    The means are of the readings as given, not of ones replaced before. The first and the last reading stay
    as they are; no readings give an empty list.

    >>> smoothed([10, 40, 11, 12])
    [10, 20, 21, 12]
    """
    result = list(readings)
    for i in range(1, len(readings) - 1):
        result[i] = sum(readings[i - 1 : i + 2]) // 3
    return result


@cases(([0, 1, 2], 5), ([], 3), ([10], 3), ([0, 10, 11], 4), ([5, 5, 5], 2), ([1, 4, 7], 3))
def waiting_times(arrivals: list[int], service: int) -> list[int]:
    """How many minutes each customer waits for a single clerk.

    The arrivals, in minutes, never descend. The clerk serves in that order, service minutes each, and starts
    on a customer once that customer is there and the one before is done. No customers give an empty list.

    >>> waiting_times([0, 2, 20], 6)
    [0, 4, 0]
    """
    free_at = 0
    waits = []
    for arrival in arrivals:
        start = max(arrival, free_at)
        waits.append(start - arrival)
        free_at = start + service
    return waits


@cases(([1, 5, 3, 3, 0],), ([],), ([4],), ([2, 2, 2],), ([0, 3, 3, 6],), ([-1, 2, -2, 4],))
def lift_journey(floors: list[int]) -> tuple[int, int]:
    """Floors travelled in all by a lift that stops at the floors in order, and how often it turns, as a pair.

    It turns when it moves the other way than on its last move; two equal floors in a row are no move.
    Fewer than two floors give (0, 0).

    >>> lift_journey([0, 4, 4, 1, 6])
    (12, 2)
    """
    travelled = turns = 0
    last_up = None
    for before, after in zip(floors, floors[1:], strict=False):
        if before == after:
            continue
        travelled += abs(after - before)
        up = after > before
        if last_up is not None and up != last_up:
            turns += 1
        last_up = up
    return travelled, turns


@cases(
    ("09:00", "12:00"),
    ("08:00", "14:00"),
    ("08:00", "14:01"),
    ("23:30", "00:15"),
    ("20:00", "06:30"),
    ("07:00", "07:00"),
)
def paid_minutes(start: str, end: str) -> int:
    """Paid minutes of a shift between two times of day written "HH:MM".

    An end earlier than the start lies on the next day; equal times mean a shift of 0 minutes. A shift of more
    than 360 minutes has an unpaid break of 30 minutes.

    >>> paid_minutes("22:00", "02:30")
    270
    >>> paid_minutes("09:00", "17:00")
    450
    """
    start_hour, start_minute = start.split(":")
    end_hour, end_minute = end.split(":")
    length = (int(end_hour) - int(start_hour)) * 60 + int(end_minute) - int(start_minute)
    length %= 1440
    return length - 30 if length > 360 else length


@cases((0,), (15,), (16,), (60,), (61,), (121,), (1440,))
def parking_fee(minutes: int) -> int:
    """Parking fee in cents.

    Up to 15 minutes are free. A longer stay costs 200 for the first hour, counted from the very start,
    and 150 for each further hour begun, but never more than 1200.

    >>> parking_fee(45)
    200
    >>> parking_fee(130)
    500
    """
    if minutes <= 15:
        return 0
    hours = (minutes + 59) // 60
    return min(1200, 200 + 150 * (hours - 1))


@cases((10, [3, 4, 5, 2]), (0, [1, 2]), (5, []), (6, [6, 1]), (9, [10, 9]), (7, [0, 8, 3, 4]))
def orders_shipped(stock: int, orders: list[int]) -> list[int]:
    """Indices of the orders that are shipped, in order.

    Orders are taken one by one; one that is not larger than the stock left is shipped whole and reduces the
    stock, any other is skipped. An empty list if none is shipped.

    >>> orders_shipped(20, [12, 9, 5, 4, 3])
    [0, 2, 4]
    """
    shipped = []
    for i, order in enumerate(orders):
        if order <= stock:
            stock -= order
            shipped.append(i)
    return shipped


@cases((0,), (7,), (1234,), (105,), (-1234,), (99999,))
def pair_sum(number: int) -> int:
    """Sum of the two-digit numbers that the digits make, paired from the right.

    If the count of digits is odd, the leftmost digit stands alone. The sign is ignored.

    >>> pair_sum(51207)
    24
    >>> pair_sum(-3010)
    40
    """
    number = abs(number)
    total = 0
    while number:
        total += number % 100
        number //= 100
    return total


@cases((0,), (4,), (372,), (-909,), (5515,), (1080,), (-61,))
def drop_largest_digit(number: int) -> int:
    """The number without its largest digit.

    If the largest digit occurs several times, only the leftmost of these goes. The sign stays, and zeros that
    come to stand in front vanish. A number of one digit gives 0.

    >>> drop_largest_digit(2858)
    258
    >>> drop_largest_digit(-3071)
    -301
    """
    digits = str(abs(number))
    rest = int(digits.replace(max(digits), "", 1) or "0")
    return -rest if number < 0 else rest


@cases(([5, 9, 4, 5, 4], 1), ([], 3), ([8], 0), ([1, 2, 9], 0), ([3, 3, 3], 0), ([-4, 7, 0, 2], 2))
def settled_from(readings: list[int], tolerance: int) -> int:
    """First index from which on every reading is within the tolerance of the last reading.

    A difference equal to the tolerance is within it. No readings give -1.

    >>> settled_from([10, 30, 19, 22, 20], 2)
    2
    """
    if not readings:
        return -1
    at = len(readings) - 1
    while at > 0 and abs(readings[at - 1] - readings[-1]) <= tolerance:
        at -= 1
    return at


@cases(
    (540, 600, [(550, 560)]),
    (540, 600, []),
    (0, 100, [(10, 50), (40, 60)]),
    (100, 200, [(50, 120), (190, 300)]),
    (10, 20, [(0, 30)]),
    (0, 10, [(3, 3), (5, 6), (5, 6)]),
)
def free_minutes(opens: int, closes: int, bookings: list[tuple[int, int]]) -> int:
    """Minutes between opening and closing not taken by any booking.

    A booking is a pair (start, end) and takes the minutes from start up to but not including end.
    Bookings may overlap and may reach outside the opening hours.

    >>> free_minutes(600, 660, [(590, 610), (605, 620), (650, 655)])
    35
    """
    free = 0
    for minute in range(opens, closes):
        if not any(start <= minute < end for start, end in bookings):
            free += 1
    return free


@cases(
    ([(2, 5), (4, 8)],),
    ([],),
    ([(3, 6)],),
    ([(1, 4), (4, 7)],),
    ([(5, 9), (0, 2), (1, 3), (6, 7)],),
    ([(0, 10), (2, 6), (5, 8)],),
    ([(5, 9), (0, 2)],),
)
def busiest_minute(visits: list[tuple[int, int]]) -> int:
    """The earliest minute at which the most visitors are inside.

    A visit is a pair (arrival, departure) with arrival before departure; the visitor is inside from the
    minute of arrival on, but no longer in the minute of departure. No visits give -1.

    >>> busiest_minute([(10, 20), (12, 15), (15, 30)])
    12
    """
    best, best_at = 0, -1
    for minute in sorted(arrival for arrival, _ in visits):
        inside = sum(arrival <= minute < departure for arrival, departure in visits)
        if inside > best:
            best, best_at = inside, minute
    return best_at


@cases(
    ([400, 900, 100],),
    ([],),
    ([500, 500, 500, 700],),
    ([500, 500, 500, 700, 700],),
    ([600, 499, 600, 600, 300, 600, 600],),
    ([500, 500, 500, 10, 500, 500, 500, 20],),
)
def paid_with_stamps(purchases: list[int]) -> int:
    """Total in cents paid by a customer with a stamp card, for purchases made one after the other.

    Each paid purchase of at least 500 earns a stamp. Once the card has three stamps, the next purchase,
    of any amount, is free and earns no stamp, and the card is empty again. No purchases give 0.

    >>> paid_with_stamps([500, 800, 200, 600, 900, 100])
    2200
    """
    paid = stamps = 0
    for amount in purchases:
        if stamps == 3:
            stamps = 0
            continue
        paid += amount
        if amount >= 500:
            stamps += 1
    return paid


@cases((1000, 10, 300), (0, 5, 100), (500, 0, 100), (1000, 10, 100), (1000, 10, 101), (99, 1, 99))
def months_to_repay(debt: int, percent: int, payment: int) -> int:
    """Number of monthly payments until a debt in cents is paid off.

    Each month the interest is added first: percent of the debt, rounded down to a whole cent. Then the
    payment is taken off, or the whole debt if that is smaller. No debt needs 0; if the first month's interest
    is at least the payment, the debt never ends: -1.

    >>> months_to_repay(1000, 2, 400)
    3
    """
    if debt and debt * percent // 100 >= payment:
        return -1
    months = 0
    while debt > 0:
        debt += debt * percent // 100
        debt -= payment
        months += 1
    return months


@cases((0,), (100000,), (100001,), (100010,), (350000,), (300000,), (1000000,))
def tax_due(income: int) -> int:
    """Tax in cents on an income in cents.

    The part up to 100000 is free, the part above that up to 300000 is taxed at 10 percent, and the part above
    300000 at 25 percent. The sum is rounded down to a whole cent.

    >>> tax_due(150000)
    5000
    >>> tax_due(400000)
    45000
    """
    middle = max(0, min(income, 300000) - 100000)
    top = max(0, income - 300000)
    return (middle * 10 + top * 25) // 100


@cases(
    ([300, 250, 0, 250, 400],),
    ([],),
    ([0, 0],),
    ([90],),
    ([50, 50, 50, 60],),
    ([0, 70, 60],),
)
def race_places(times: list[int]) -> list[int]:
    """The place of each runner, given the running times in seconds.

    The place is 1 plus the number of runners with a shorter time, so equal times share a place. A time of 0
    means that the runner did not finish: place 0, and not counted for the others. No runners give an
    empty list.

    >>> race_places([62, 0, 58, 62, 70])
    [2, 0, 1, 2, 4]
    """
    finished = [time for time in times if time > 0]
    return [1 + sum(other < time for other in finished) if time else 0 for time in times]


@cases(
    ([5, 5, 5, 8],),
    ([],),
    ([4],),
    ([0, 7, 7, 7, 7, 0, 0, 0],),
    ([1, 2, 1, 2],),
    ([3, 3, 9, 3, 3, 3],),
    ([2, 2, 6, 6, 2, 6, 6, 6],),
)
def debounced(samples: list[int]) -> list[int]:
    """The values a noisy switch reports, in order.

    A value is reported at its third consecutive sample, unless it is the value reported last. Rows of fewer
    than three equal samples report nothing; an empty list if nothing is reported.

    >>> debounced([1, 1, 1, 1, 0, 1, 0, 0, 0])
    [1, 0]
    >>> debounced([1, 1, 1, 0, 1, 1, 1])
    [1]
    """
    reported = []
    for i in range(2, len(samples)):
        value = samples[i]
        if samples[i - 2] == samples[i - 1] == value and (not reported or reported[-1] != value):
            reported.append(value)
    return reported


@cases(
    ([8, 12, 13], 10),
    ([], 10),
    ([10, 10], 10),
    ([0, 0, 30], 10),
    ([15], 10),
    ([4, 11, 20, 5, 18], 10),
)
def extra_data(used: list[int], allowance: int) -> list[int]:
    """For each month, the gigabytes used beyond what was available.

    Available are the month's allowance and what was carried over from the month before. Use is taken from
    the carried-over part first; of the allowance, what is left is carried over to the next month only.
    Nothing is carried into the first month, and no months give an empty list.

    >>> extra_data([7, 12, 12, 3, 1, 22], 10)
    [0, 0, 1, 0, 0, 2]
    """
    carried = 0
    extra = []
    for amount in used:
        from_allowance = max(0, amount - carried)
        extra.append(max(0, from_allowance - allowance))
        carried = max(0, allowance - from_allowance)
    return extra


@cases(
    (80, {50: 1, 20: 2, 10: 1}),
    (0, {50: 2}),
    (60, {50: 1, 20: 3}),
    (30, {}),
    (100, {20: 4, 50: 2}),
    (40, {10: 1, 5: 9}),
)
def change_from_drawer(cents: int, drawer: dict[int, int]) -> list[int] | None:
    """The coins handed out as change, largest first.

    The drawer maps each coin's value to how many there are. Going from the largest value to the smallest, as
    many of each are taken as are there and fit into what is still owed, and none is ever put back. None if
    something is still owed at the end; no change owed gives an empty list.

    >>> change_from_drawer(90, {10: 5, 20: 1, 50: 3})
    [50, 20, 10, 10]
    >>> change_from_drawer(70, {50: 1, 5: 2}) is None
    True
    """
    coins = []
    for value in sorted(drawer, reverse=True):
        count = min(drawer[value], cents // value)
        coins += [value] * count
        cents -= value * count
    return None if cents else coins


@cases(
    ([(3, 0), (1, 1)],),
    ([],),
    ([(0, 1), (0, 2)],),
    ([(4, 1), (2, 3), (5, 4)],),
    ([(0, 0), (3, 4), (3, 3)],),
    ([(4, 0), (5, 6), (1, 4)],),
)
def season_points(games: list[tuple[int, int]]) -> int:
    """Points of a team over its games, each a pair of goals (for, against).

    A win gives 3 points, a draw 1, a loss 0. A win by three goals or more gives 1 point extra, and so does a
    loss by exactly one goal in which the team scored three or more. No games give 0.

    >>> season_points([(4, 0), (3, 4), (2, 2), (1, 0)])
    9
    """
    points = 0
    for ours, theirs in games:
        margin = ours - theirs
        if margin > 0:
            points += 4 if margin >= 3 else 3
        elif margin == 0:
            points += 1
        elif margin == -1 and ours >= 3:
            points += 1
    return points


@cases(
    ([(10, 99)],),
    ([],),
    ([(9, 111), (1, 500)],),
    ([(12, 105), (2, 50)],),
    ([(20, 600)],),
    ([(0, 700), (100, 100), (3, 33)],),
    ([(1, 10000)],),
)
def invoice_total(lines: list[tuple[int, int]]) -> int:
    """Total in cents of invoice lines, each a pair (quantity, price of one in cents).

    A line of ten or more pieces costs 5 percent less, its discount rounded down to a whole cent. Shipping
    of 490 is added if the lines, after discount, come to less than 10000; an invoice without lines costs 0.

    >>> invoice_total([(2, 300), (10, 99)])
    2031
    >>> invoice_total([(15, 1000)])
    14250
    """
    if not lines:
        return 0
    total = 0
    for quantity, price in lines:
        amount = quantity * price
        total += amount - (amount * 5 // 100 if quantity >= 10 else 0)
    return total + 490 if total < 10000 else total


@cases(("12",), ("0",), ("4071",), ("000",), ("98765",), ("6",), ("05",))
def account_check_digit(account: str) -> str:
    """Check digit of an account number written as digits.

    From the right, the digits are multiplied by 2, 3, 4, 2, 3, 4 and so on, and the products are added. The
    check digit is the remainder of that sum after division by 11, with "X" for a remainder of 10.

    >>> account_check_digit("5213")
    '5'
    >>> account_check_digit("5")
    'X'
    """
    total = sum(int(digit) * (2 + i % 3) for i, digit in enumerate(reversed(account)))
    remainder = total % 11
    return "X" if remainder == 10 else str(remainder)


@cases(
    ([2, 2, 3], 5),
    ([], 5),
    ([4, 6, 1], 5),
    ([6], 5),
    ([5, 0, 5], 5),
    ([1, 9, 4, 1, 1], 5),
)
def load_trips(weights: list[int], limit: int) -> list[int]:
    """Total weight of each trip of a van that loads parcels in order.

    A parcel goes on the current trip if the total then stays at or below the limit; if not, a new trip
    begins with it. A parcel heavier than the limit is left behind, and the current trip goes on as if it
    were not there. No parcels loaded give an empty list.

    >>> load_trips([3, 4, 20, 2, 5], 10)
    [9, 5]
    """
    trips = []
    for weight in weights:
        if weight > limit:
            continue
        if trips and trips[-1] + weight <= limit:
            trips[-1] += weight
        else:
            trips.append(weight)
    return trips
