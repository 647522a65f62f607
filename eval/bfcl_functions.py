"""The functions of BFCL's executable records that need no network, written from their documents in the benchmark.

    add_binary_numbers .. sort_array   the 32 functions
    answer_calls                       run calls, one line of JSON on stdout per call

Parameter names are the documents'. Where a document leaves something open (population or sample deviation, what a
booking returns) one choice is made here: the gold call and the predicted one run through the same function, so what
counts is which arguments lead to equal results, and which lead to none. There the benchmark's own functions decide: a
number that they count with must be an integer, so 5.0 has no factorial, while any number of years has a future value.
This file is itself the program that the sandbox runs (eval/evaluate_bfcl.py), hence it imports the standard library
only. Values come from models: nothing is evaluated as Python, but a call can still ask for a factorial without end.
"""

import ast
import json
import math
import operator
import sys
from collections.abc import Callable, Sequence
from fractions import Fraction

MAX_RESULT_CHARACTERS = 8192  # of one result as JSON; the longest gold result, the factorial of 1000, has 2,568

ACTIVITY_FACTORS = (1.2, 1.375, 1.55, 1.725, 1.9)  # daily energy over basal rate, levels 1 (sedentary) to 5
MALE_KILOCALORIES, OTHER_KILOCALORIES = 5.0, -161.0  # Mifflin-St Jeor; the benchmark knows male and all others
GOAL_KILOCALORIES = {"lose": -500.0, "gain": 500.0}  # any other goal: no change
DERIVATIVE_STEP = Fraction(1, 10**6)


# ---------------------------------------------------------------------------------------------------------------------
# Integers


def add_binary_numbers(a: str, b: str) -> str:
    """Sum of two numbers in binary digits, in binary digits."""
    return f"{int(a, 2) + int(b, 2):b}"


def get_fibonacci_number(n: int) -> int:
    """Number at position n, from 1, of 0, 1, 1, 2, 3, 5, ..."""
    if n in (1, 2):  # also as 1.0, 2.0
        return int(n) - 1
    if n <= 0:
        raise ValueError(f"found position {n}, expected one from 1")
    return get_fibonacci_sequence(n)[-1]


def get_fibonacci_sequence(n: int) -> list[int]:
    """The first n numbers of 0, 1, 1, 2, 3, 5, ..., at least two. Raises TypeError unless n is an integer."""
    numbers = [0, 1]
    for _ in range(2, n):
        numbers.append(numbers[-1] + numbers[-2])
    return numbers


def get_prime_factors(number: int) -> list[int]:
    """Prime factors in ascending order, each as often as it divides; 456.0 has those of 456."""
    rest, factors, divisor = int(number), [], 2
    if rest != number:  # the benchmark's function never ends then
        raise ValueError(f"found {number}, expected a whole number")
    while divisor * divisor <= rest:
        while rest % divisor == 0:
            factors.append(divisor)
            rest //= divisor
        divisor += 1
    return factors + [rest] if rest > 1 else factors


def math_factorial(n: int) -> int:
    """n!, 1 for n < 0. Raises TypeError unless n is an integer."""
    return math.factorial(max(operator.index(n), 0))


def math_gcd(a: int, b: int) -> int:
    """Greatest common divisor by Euclid's algorithm, also of floats; its sign is that of the last remainder."""
    while b != 0:
        a, b = b, a % b
    return a


def math_lcm(a: int, b: int) -> float:
    """Least common multiple."""
    return a * b / math_gcd(a, b)


def calculate_permutations(n: int, k: int) -> float:
    """Ordered choices of k out of n: n! / (n - k)!. Raises TypeError unless both are integers."""
    return math_factorial(n) / math_factorial(n - k)


# ---------------------------------------------------------------------------------------------------------------------
# Statistics


def calc_binomial_probability(n: int, k: int, p: float) -> float:
    """Probability of k successes in n trials, C(n, k) p^k (1 - p)^(n - k). TypeError unless n, k are integers."""
    return math_factorial(n) / (math_factorial(k) * math_factorial(n - k)) * p**k * (1 - p) ** (n - k)


def calculate_mean(numbers: Sequence[float]) -> float:
    """Arithmetic mean."""
    return sum(numbers) / len(numbers)  # rounded in the order written, as the benchmark's


def calculate_standard_deviation(numbers: Sequence[float]) -> float:
    """Standard deviation of the numbers as a whole population: division by n."""
    mean = calculate_mean(numbers)
    return math.sqrt(sum((number - mean) ** 2 for number in numbers) / len(numbers))


def linear_regression(x: Sequence[float], y: Sequence[float], point: float) -> float:
    """Value at `point` of the line with the least squares through (x_i, y_i)."""
    points = list(zip(x, y, strict=True))
    mean_x, mean_y = calculate_mean(x), calculate_mean(y)
    slope = math.fsum((x_i - mean_x) * (y_i - mean_y) for x_i, y_i in points) / math.fsum(
        (x_i - mean_x) ** 2 for x_i in x
    )
    return mean_y + slope * (point - mean_x)


def sort_array(array: Sequence[float], reverse: bool = False) -> list[float]:
    """Ascending, or descending with `reverse`."""
    return sorted(array, reverse=reverse)


# ---------------------------------------------------------------------------------------------------------------------
# Vectors, points, formulas


def calculate_cosine_similarity(vectorA: Sequence[float], vectorB: Sequence[float]) -> float:
    """Dot product over the product of the lengths."""
    dot = math.fsum(a * b for a, b in zip(vectorA, vectorB, strict=True))
    return dot / (math.hypot(*vectorA) * math.hypot(*vectorB))


def mat_mul(matA: Sequence[Sequence[float]], matB: Sequence[Sequence[float]]) -> list[list[float]]:
    """Matrix product; if A has not as many columns as B has rows, over those that both have."""
    columns = list(zip(*matB, strict=True))
    # not strict: one gold call multiplies a 2 x 4 matrix by a 2 x 4 matrix
    return [[sum(a * b for a, b in zip(row, column, strict=False)) for column in columns] for row in matA]


def get_distance(pointA: Sequence[float], pointB: Sequence[float]) -> float:
    """Euclidean distance of two points of the plane, by their first two coordinates."""
    (x, y, *_), (other_x, other_y, *_) = pointA, pointB
    return math.hypot(x - other_x, y - other_y)


def maxPoints(points: Sequence[Sequence[int]]) -> int:
    """Largest number of the points on one straight line."""
    most = min(len(points), 1)
    for index, (x, y) in enumerate(points):
        for other_x, other_y in points[index + 1 :]:
            # on the line through both: the cross product with its direction is zero. A double point has no direction.
            across = [(third_x - x) * (other_y - y) == (third_y - y) * (other_x - x) for third_x, third_y in points]
            is_double = (x, y) == (other_x, other_y)
            most = max(most, sum([x, y] == list(third) for third in points) if is_double else sum(across))
    return most


def polygon_area(vertices: Sequence[Sequence[float]]) -> float:
    """Area by the shoelace formula, whichever way round the vertices go; three at least."""
    if not isinstance(vertices, list) or len(vertices) < 3:  # the benchmark's function appends to the list
        raise ValueError(f"found a {type(vertices).__name__} of {len(vertices)}, expected a list of three or more")
    following = [*vertices[1:], *vertices[:1]]
    return abs(sum(x * next_y - next_x * y for (x, y), (next_x, next_y) in zip(vertices, following))) / 2


def calculate_triangle_area(base: float, height: float) -> float:
    """Half of base times height."""
    return base * height / 2


def geometry_area_circle(radius: float) -> float:
    """pi r^2"""
    return math.pi * radius**2


def quadratic_roots(a: float, b: float, c: float) -> list[complex]:
    """Both roots of a x^2 + b x + c, the one with the plus sign first; complex if there is no real one."""
    discriminant = b * b - 4 * a * c
    root = math.sqrt(discriminant) if discriminant >= 0 else complex(0.0, math.sqrt(-discriminant))
    return [(-b + root) / (2 * a), (-b - root) / (2 * a)]


def estimate_derivative(function: str, x: float) -> float:
    """Slope at x of a function given as the text of a Python lambda: its central difference over 2e-6.

    The text is arithmetic with one parameter and functions of `math`; anything else raises ValueError. x and the step
    are fractions, so that equal polynomials have equal slopes however they are written.
    """
    if isinstance(x, str):  # Fraction would read it
        raise TypeError("found text as x, expected a number")
    tree = ast.parse(function.strip(), mode="eval").body
    if not isinstance(tree, ast.Lambda) or len(tree.args.args) != 1:
        raise ValueError("found no lambda of one parameter")
    name, center = tree.args.args[0].arg, Fraction(x)
    high, low = (_value_of(tree.body, name, point) for point in (center + DERIVATIVE_STEP, center - DERIVATIVE_STEP))
    return float((high - low) / (2 * DERIVATIVE_STEP))


OPERATORS = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.FloorDiv: operator.floordiv,
    ast.Mod: operator.mod,
    ast.Pow: operator.pow,
    ast.UAdd: operator.pos,
    ast.USub: operator.neg,
}
NUMBER_FUNCTIONS = {"abs": abs, "pow": operator.pow} | {
    name: getattr(math, name)
    for name in (
        "sin",
        "cos",
        "tan",
        "asin",
        "acos",
        "atan",
        "sinh",
        "cosh",
        "tanh",
        "exp",
        "log",
        "log2",
        "log10",
        "sqrt",
        "fabs",
        "pow",
    )
}


def _value_of(node: ast.expr, parameter: str, x: Fraction) -> Fraction | float:
    """Value of an arithmetic expression in `parameter` at x. Raises ValueError for any other expression."""
    if isinstance(node, ast.Constant) and type(node.value) in (int, float):
        return Fraction(node.value)
    if isinstance(node, ast.Name) and node.id == parameter:
        return x
    if (
        isinstance(node, ast.Attribute)
        and isinstance(node.value, ast.Name)
        and node.value.id == "math"
        and node.attr in ("pi", "e")
    ):
        return getattr(math, node.attr)
    if isinstance(node, ast.BinOp) and type(node.op) in OPERATORS:
        return OPERATORS[type(node.op)](_value_of(node.left, parameter, x), _value_of(node.right, parameter, x))
    if isinstance(node, ast.UnaryOp) and type(node.op) in OPERATORS:
        return OPERATORS[type(node.op)](_value_of(node.operand, parameter, x))
    if isinstance(node, ast.Call) and not node.keywords:
        called = node.func
        if isinstance(called, ast.Attribute) and isinstance(called.value, ast.Name) and called.value.id == "math":
            called = ast.Name(called.attr)
        if isinstance(called, ast.Name) and called.id in NUMBER_FUNCTIONS:
            return NUMBER_FUNCTIONS[called.id](*(_value_of(argument, parameter, x) for argument in node.args))
    raise ValueError(f"found {type(node).__name__}, expected arithmetic in {parameter}")


# ---------------------------------------------------------------------------------------------------------------------
# Physics


def calculate_density(mass: float, volume: float) -> float:
    """Mass over volume, kg / m^3."""
    return mass / volume


def calculate_displacement(initial_velocity: float, acceleration: float, time: float) -> float:
    """v t + a t^2 / 2, in metres."""
    return initial_velocity * time + acceleration * time**2 / 2


def calculate_electrostatic_potential_energy(charge: float, voltage: float) -> float:
    """Charge times voltage, in joules."""
    return charge * voltage


def calculate_final_velocity(initial_velocity: float, acceleration: float, time: float) -> float:
    """v + a t, in metres per second."""
    return initial_velocity + acceleration * time


# ---------------------------------------------------------------------------------------------------------------------
# Money, daily life


def calculate_future_value(present_value: float, interest_rate: float, periods: int) -> float:
    """Value after `periods` years of compound interest."""
    return present_value * (1 + interest_rate) ** periods


def calculate_investment_value(
    initial_investment: float,
    annual_contribution: float,
    years: int,
    annual_return: float,
    inflation_rate: Sequence[float],
    adjust_for_inflation: bool = True,
) -> float:
    """Value after `years`: each year a return, then a contribution, then what that year's inflation leaves of it.

    Raises TypeError unless `years` is an integer, IndexError for a year without a rate that it needs.
    """
    value = initial_investment
    for year in range(years):
        value = value * (1 + annual_return) + annual_contribution
        value = value / (1 + inflation_rate[year]) if adjust_for_inflation else value
    return value


def mortgage_calculator(loan_amount: float, interest_rate: float, loan_period: int) -> float:
    """Monthly payment of an annuity loan over `loan_period` years, interest a twelfth of the yearly rate per month."""
    rate = interest_rate / 12
    return loan_amount * rate / (1 - (1 + rate) ** (-12 * loan_period))


def calculate_nutritional_needs(
    weight: float, height: float, age: float, gender: str, activity_level: int, goal: str
) -> dict[str, float]:
    """Daily needs: energy by Mifflin-St Jeor, 30 % of it protein, 30 % fat, 40 % carbohydrates.

    Raises TypeError unless the level is an integer, IndexError for a level above 5.
    """
    basal = 10 * weight + 6.25 * height - 5 * age + (MALE_KILOCALORIES if gender == "male" else OTHER_KILOCALORIES)
    energy = basal * ACTIVITY_FACTORS[activity_level - 1] + GOAL_KILOCALORIES.get(goal, 0.0)
    return {
        "kilocalories": energy,
        "protein_grams": 0.3 * energy / 4,
        "fat_grams": 0.3 * energy / 9,
        "carbohydrate_grams": 0.4 * energy / 4,
    }


def book_room(
    room_type: str,
    price: float,
    check_in_date: str,
    check_out_date: str,
    customer_id: str,
    discount_code: str | None = None,
) -> dict[str, object]:
    """The booking and its price, which only the one discount code that the benchmark honours changes."""
    return {
        "room_type": room_type,
        "price": price * 0.9 if discount_code == "DISCOUNT10" else price,
        "check_in_date": check_in_date,
        "check_out_date": check_out_date,
        "customer_id": customer_id,
    }


def order_food(item: Sequence[str], quantity: Sequence[int], price: Sequence[float]) -> float:
    """Total price; quantities and prices beyond the number of items do not count."""
    return sum(quantity[number] * price[number] for number in range(len(item)))


FUNCTIONS: dict[str, Callable] = {
    function.__name__: function
    for function in (
        add_binary_numbers,
        book_room,
        calc_binomial_probability,
        calculate_cosine_similarity,
        calculate_density,
        calculate_displacement,
        calculate_electrostatic_potential_energy,
        calculate_final_velocity,
        calculate_future_value,
        calculate_investment_value,
        calculate_mean,
        calculate_nutritional_needs,
        calculate_permutations,
        calculate_standard_deviation,
        calculate_triangle_area,
        estimate_derivative,
        geometry_area_circle,
        get_distance,
        get_fibonacci_number,
        get_fibonacci_sequence,
        get_prime_factors,
        linear_regression,
        mat_mul,
        math_factorial,
        math_gcd,
        math_lcm,
        maxPoints,
        mortgage_calculator,
        order_food,
        polygon_area,
        quadratic_roots,
        sort_array,
    )
}


# ---------------------------------------------------------------------------------------------------------------------
# Program


def answer_call(name: str, arguments: dict) -> str:
    """One line of JSON: {"result": ..} (complex numbers as text), or {"fault": ..} for a call that gives none."""
    try:
        if name not in FUNCTIONS:
            raise NameError(f"no function {ascii(name)[:60]} without a network")
        line = json.dumps({"result": FUNCTIONS[name](**arguments)}, default=repr)
        if len(line) > MAX_RESULT_CHARACTERS:
            raise ValueError(f"found {len(line)} characters of result, expected at most {MAX_RESULT_CHARACTERS}")
    except Exception as error:  # noqa: BLE001 - models call functions with anything
        return json.dumps({"fault": " ".join(f"{type(error).__name__}: {error}".split())[:200]})
    return line


def answer_calls(text: str) -> None:
    """Write the answer to each of the calls in `[(name, arguments), ..]`, Python literals, at once when it is known."""
    for name, arguments in ast.literal_eval(text):
        sys.stdout.write(answer_call(name, arguments) + "\n")
        sys.stdout.flush()
