"""Does a short plain text read as a whole like an exception, a failed request or a refusal?

Every line of `_TABLES` is a regular expression that has to match from the first word of the text on, in any letter
case: "Read timed out." is an error, an article that mentions time-outs is none. `$` is the end of the text, closing
punctuation aside. A line that begins with `...` continues the one above it, `#` begins a comment.
"""

import re

MAX_CHARACTERS = 600  # of a text that can be one message
MAX_LINES = 4

# Building blocks of the tables, in braces there; a block may use those below it. In NOUN and DO blanks separate words.
_BLOCKS = {
    # A thing of an interface, two words before it at most: "Invalid date", but not "Invalid Man Wins Race".
    "THING": r"""(?:[\w'"`-]+ ){0,2}?(?:{NOUN}\b|{QUOTED})""",
    # What is said of a thing that could not be used; words that are said of all things need {TAIL}.
    "PREDICATE": r"""(?:not found(?! in \d)|(?:does|do|did)(?: not|n't) (?:exist|match|have|support|respond)
        |(?:is|are|was)(?: not|n't) (?:a|an|in) |(?:is|are|was)(?: not|n't) {USABLE}{TAIL}|not {USABLE}{TAIL}
        |(?:is|are|was|were)? ?(?:invalid|required|missing|unavailable|unsupported|unknown|expired|disabled|malformed
        |empty$|too (?:long|short|large|small|big|many)|incorrect|wrong|out of range|denied|rejected|suspended|refused
        |exceeded){TAIL}|was (?:aborted|cancel+ed|interrupted|terminated)\b|exceeds\b|failed\b|timed? ?out\b
        |(?:has|have) (?:expired|been (?:disabled|suspended|exceeded|reached|revoked|blocked))(?:$|[.:;] )
        |(?:must|should) (?:be (?:an? |one of|in |between|of |at |less|greater|before|after|positive|unique|provided
        |specified|set\b|non|\w+$|[<>\d])|not be |contain |match |start with|end with)
        |(?:cannot|can not|can't|may not) be\b|could not be\b)""",
    "USABLE": r"""(?:valid|available|allowed|permitted|defined|registered|recogni[sz]ed|authori[sz]ed|supported
        |configured|enabled|implemented|set|specified|provided|found(?! in \d))""",
    "TAIL": r"""(?=$|[.:,;!(]| (?:for|from|on|by|or|and|as|because|due|when|but|with|to|after|at|this)\b| {QUOTED})""",
    "PROGRAM": r"""(?-i:(?:[a-z/.][\w./+-]*: +)+)""",
    "PHRASE": r"""(?:bad request|unauthenticated|unauthori[sz]ed|payment required|forbidden
        |(?:page |resource )?not found|method not allowed|not acceptable|request time-?out|conflict|gone
        |payload too large|uri too long|unsupported media type|unprocessable (?:entity|content)
        |too many requests|internal server error
        |not implemented|bad gateway|service (?:is )?(?:temporarily )?unavailable|gateway time-?out|access denied
        |permission denied)""",
    "QUOTED": r"""(?:'[^'\n]{0,200}'|"[^"\n]{0,200}"|`[^`\n]{0,200}`)""",
    "NOUN": r"""
        access account action address api app arguments? array auth(?:entication|ori[sz]ation)? base body category
        certificate channel chat character city code column command config\w* connection coordinates? country
        credentials? currency customer dates? data database device domain email endpoint entity entry event
        expression fields? files? filter folder format function handler header host\w* ids? identifier image index
        input interval ip isbn item job json keywords? keys? language latitude limit location login longitude
        message method mode model module name number object offset operation operator option order package page
        param\w* password path payload period phone postal product project property protocol query range record
        region repository request resource response result route scheme shape schema scope season secret series
        server service session signature sort source station statement string symbol syntax table tag target task
        text ticker time\w* token tool topic type unit uri url user\w* uuid values? variable version xml year zip\w*
        zone""",
    "DO": r"""
        access add allocate apply authenticate bind calculate call cd complete compute concatenate connect contact
        convert create decode delete determine download establish evaluate execute extract fetch find generate get
        handle identify import initiali[sz]e insert interpret load locate match obtain open parse perform process
        query reach read recogni[sz]e render resolve retrieve run save search send set start stat submit unpack
        update upload use validate verify write""",
}
_TABLES = {
    "exception": r"""
        # The class in front: KeyError: 'x', HTTPError('..'), java.lang.NullPointerException: ..
        (?-i:(?:\w+\.)*[A-Z]\w+(?:Error|Exception|Timeout|Interrupt))(?:\(| ?:|$)
        (?-i:(?:\w+\.)*(?:TooManyRedirects|InvalidURL|(?:Missing|Invalid)Schema|StopIteration))(?:\(|: )
        (?:\w+\.)+\w*(?:error|exception|timeout)(?:\(|: )
        (?:uncaught|unhandled) (?:\(in promise\) )?\w*(?:error|exception)\b
        exception in thread\b
        panic: |thread '[^'\n]*' panicked
        # What str() leaves of a KeyError; the released list has one of them without quotes too.
        '(?!\d+')\w*'\Z|related_searches\Z
        # Python's own sentences, without the class.
        (?:global )?name {QUOTED} is not defined
        not (?:all|enough) arguments (?:converted|for format)|(?:read|write|seek) of closed|ufunc '|the truth value of
        an? (?:integer|float|string) is required|setting an array element|event loop is closed|length of values
        no columns to parse|shape mismatch|unknown url type|input contains nan|generator already executing
        (?:cannot access )?(?:local|free) variable '
        no module named |cannot import name |module {QUOTED} has no attribute
        '?[\w.]+'? object (?:has no|is not|does not|doesn't|cannot)\b
        (?:object|argument) of type {QUOTED} (?:is not|has no)\b|object of type '?\w+'? (?:is not|has no)\b
        [\w.<>]+(?:\(\))? (?:got (?:an unexpected keyword|some positional|multiple values)|missing \d+ required)\b
        [\w.<>]+(?:\(\))? takes (?:no|at (?:most|least)|exactly|from \d+ to|\d+)(?: \d+)? (?:positional 
        ...|keyword )?argument
        [\w.<>]+\(\) (?:argument|arg|expected|requires|takes|got|missing|not defined|first argument|keywords must)
        dictionary update sequence|a bytes-like object is required|(?:unsupported|bad) operand type
        ...|unsupported type for|can only (?:concatenate|join|assign|compare)
        can't (?:multiply|concat|convert|compare|assign|pickle|adapt|mod|subtract|set attributes)
        cannot (?:unpack|convert|concatenate|reshape|pickle|cast|reindex|infer|unmarshal|deserialize)\b
        '[<>=!]{1,2}' not supported between
        must be (?:real number|str|string|int|integer|bytes|list|dict|float|a (?:string|number|list|dict)|an int)\b
        type object {QUOTED} has no attribute|descriptor {QUOTED} (?:requires|for|needs|of)\b
        expected \w+ instance, \w+ found
        sequence item \d+: |expected (?:str|string|bytes|int|\w+ or \w+)\b.{0,60}(?:\bgot|\bnot|\bbut)\b
        invalid literal for|could not convert|not enough values|too many values|unhashable type|unknown format code
        (?:\w+ ){0,2}(?:index|indices) (?:out of range|must be (?:an? )?(?:int|slice))|index -?\d+ is out of bounds
        pop from (?:an )?empty|(?:\w+ )?(?:division|modulo|division or modulo) by zero|math (?:domain|range) error
        maximum recursion depth|time data {QUOTED} does not|unconverted data remains|day is out of range
        (?:\w+ ){1,2}must be in \d+\.\.|year -?\d+ is out of range|invalid isoformat|i/o operation on closed
        \[(?:errno|winerror) -?\d+\]|<urlopen error|\('connection aborted
        # Parsers, databases, JavaScript, numpy.
        expecting (?:value|property name|'|,)|extra data: line|unterminated string|unexpected (?:token|end of|eof)\b
        invalid (?:syntax|control character|\\?\w* ?escape|start byte)|{QUOTED} codec can't|incorrect padding
        .{1,80} \((?:<\w+>|\S+\.py), line \d+\)$
        unexpected indent|eol while|unindent does not
        no such (?:table|column)|sqlstate\[|ora-\d{5}|\(\d{4}, ['"]|near {QUOTED}: syntax|database is locked
        (?:unique|foreign key|not null|check) constraint failed|duplicate (?:key value|entry ')|relation {QUOTED} does
        cannot read propert|\S+ is not (?:a function|defined|iterable|callable|a constructor)$|failed to fetch$
        operands could not be broadcast|shapes? \(.{1,30} not aligned|singular matrix$|all arrays must be
        \S+ is not in list$|list\.remove\(x\)|substring not found$|embedded null|file is not a zip
    """,
    "HTTP error": r"""
        # With the number: 404 Not Found, HTTP 429, HTTP/1.1 503 .., Error 500, 503 Server Error: .., status code 404
        (?:http(?:s|/[\d.]+)?[ :-]*)?(?:(?:status(?: code)?|error|code)[ :-]*)?[45]\d\d\b[ :,-]*\(?(?:{PHRASE}\b
        ...|(?:client|server) error)
        http(?:s|/[\d.]+)?[ :-]*(?:status|error|code)?(?: code)?[ :-]*[45]\d\d\b
        (?:(?:http )?(?:status|response) code|error(?: code)?)[ :-]*[45]\d\d\b
        (?:the )?(?:request|response|call|api call|fetch|server) (?:failed|returned
        ...|responded)(?: with)?(?: an?)?(?: http)?(?: status| error| response)?(?: code)?[ :]*(?:[45]\d\d|error)\b
        # The phrase alone, or with a detail that is no title.
        (?:error[ :-]*)?{PHRASE}(?:$|[:.,;!] .*(?:['"_\d/(]|\b{NOUN}\b)|\s*\(\d)
    """,
    "network": r"""
        max(?:imum)? retries exceeded|exceeded \d+ redirects|too many redirects
        (?:the |upstream )?(?:(?:read|write|connect|connection|request|operation|gateway|socket|server|query|execution
        ...|command|process|tool|call|task|job|search|api|function) ?){1,2}(?: ?has)? ?(?:timed[ -]?out
        ...|time[ -]?out)\b(?! (?:is|was|were|are|for)\b)
        timed out$|timed out (?:after|while|waiting)\b|time-?out$|timeout (?:of|after|while|error|exceeded|waiting
        ...|reached|:)
        (?:econn|etimed|enotfound|enoent|eacces|epipe|eai_|ehost)\w*
        (?-i:(?:net::)?ERR_[A-Z_]+)\b
        connection (?:error|refused|reset|aborted|closed|failed|lost|broken|to \S+ (?:failed|refused|timed))(?:$|[:.,]
        ...| (?:by|with|while|for|on|from|to|after|before))
        (?:could not|couldn't|cannot|failed to|unable to) (?:resolve|connect|reach|establish)\b
        name or service not known|temporary failure in|network (?:is )?(?:error|unreachable|failure)|no route to host
        remote end closed|ssl: |\[ssl|certificate verify
        (?:the )?(?:\w+ )?(?:server|service|backend|upstream|api|system|model|engine)(?: is)?(?: currently
        ...| temporarily)? (?:overloaded|busy|unavailable|unable|down|not (?:available|responding|reachable))\b
    """,
    "limit": r"""
        maximum (?:number|amount) of \w+ (?:reached|exceeded)
        (?:(?:api|your|the|daily|monthly|hourly|request|requests|call|calls|rate|usage|user|free|plan|token
        ...|credits?) ){0,4}(?:limit|quota|credits?|limits)(?: for \w+)? (?:(?:has|have|was|is
        ...|are) )?(?:been )?(?:exceeded|reached|hit|exhausted|used up)\b
        rate[ _-]?limit(?:ed|s)?(?:$|[:.,]? (?:exceeded|reached|error|hit))|not enough (?:\w+ )?(?:credits?|balance
        ...|funds|quota|memory|space)\b|resource[ _]exhausted|request was throttled
        (?:you|your \w+|client)(?: \w+)?(?: have| has)? (?:exceeded|reached|hit|exhausted|run out of
        ...|used up)\b.{0,60}(?:limit|quota|credits?|requests|calls|plan)
        too many (?:requests|calls|connections|attempts)\b(?:$|[:.,;]| (?:from|in|per|to|please|sent))
        insufficient (?:\w+ )?(?:funds|balance|credits?|quota|permissions?|privileges|scopes?)\b
    """,
    "shell": r"""
        # `sh: 1: jq: not found`, `ls: cannot access 'x': No such file or directory`, and the like
        {PROGRAM}(?:(?:line )?\d+: )?(?:[^\n:]{0,200}: )*(?:command not found|not found|no such file|permission denied
        ...|(?:is|not) a directory|operation not permitted|file exists|no space left|directory not empty
        ...|event not found|no matches found|unbound variable|syntax error|connection refused)
        {PROGRAM}{QUOTED} is not\b
        {PROGRAM}(?:(?:line )?\d+: )?(?:can't|cannot|could not|unable to|failed to|invalid|illegal|unrecogni[sz]ed
        ...|missing|bad|too (?:few|many)|option requires|fatal|error:|\(\d+\))
        (?:/\S*/)?(?:sed|awk|gawk|grep|tar|cp|mv|rm|ls|chmod|chown|mkdir|curl|wget|gcc|ssh|scp|unzip|gzip|jq|xargs
        ...|bash|zsh|sh): \S
        (?:fatal|abort): \S|make: \*\*\* |npm err!|e: (?:unable|package)|segmentation fault|killed$|bus error
        command not found(?:$|:)|{QUOTED} is not recogni[sz]ed as|command [^\n]{1,200} returned non-zero
        (?:exit|exited|process|command|program)(?: \w+){0,3} (?:status|code)[: ]+(?!0\b)-?\d
    """,
    "refusal": r"""
        # Errors by name
        (?:(?:fatal|internal|unknown|unexpected|api|json|xml|decode|server|runtime|syntax|parse|parsing|validation
        ...|connection|network|http|client|database|sql|query|execution|authentication|response|tool|function
        ...|parameter|parameter type|input|type|value|request|compile|compilation) )*(?:error|failure|failed)(?:$
        ...| occurred)
        an? (?:\w+ ){0,2}(?:error|exception|problem) (?:has |was )?(?:occurred|encountered|happened|thrown|raised)(?:$
        ...|[.:,;!(]| (?:while|during|when|at|on|with|processing|trying)\b)
        (?:there was|encountered|we had) an? (?:\w+ )?(?:error|problem|issue) (?:\w+ing|while|when|with)\b
        error (?:executing|calling|fetching|parsing|loading|processing|retrieving|connecting|getting|opening|running
        ...|invoking|while|during|occurred|code|in \w+\(|on line|at line|converting|querying|accessing|decoding)\b
        (?:mcp |(?:json-?)?rpc )?error -?\d{3,5}\b|\d{1,3} validation errors? for \w
        something went wrong|oops\b.{0,60}(?:wrong|error|problem)
        (?:output|your output) format does not match|(?:invalid|bad) api call
        # The input
        (?:missing|no|without|undefined|empty)(?: \w+){0,2}? (?:api[ _-]?key|param(?:eter)?s?|arguments?|fields?
        ...|credentials|token|authentication|authori[sz]ation|propert(?:y|ies))\b(?:$|:| (?:found|provided|specified
        ...|given|supplied|in|for|was|is|passed)\b| {QUOTED}| ?\w+$)
        missing (?:required|mandatory) \w+
        (?:invalid|illegal|unrecogni[sz]ed|unsupported|malformed|nonexistent|expired)(?: or \w+)?:? {THING}
        (?:unknown|incorrect|unexpected|wrong|undefined):? {THING}(?:$|[:;.!(=]| {QUOTED}| \S*[_\d]\S*| \w+$| (?:for
        ...|provided|given|specified|supplied|name|type|value|of arguments|received|must)\b)
        no such (?:{NOUN}\b|(?!thing|luck)\w+(?:$|:| {QUOTED}))|.{0,60} due to an? (?:\w+ )?(?:error|timeout|failure)$
        ...|no \w+ named \S+$|unauthori[sz]ed (?:access|request|user|client|call)
        please (?:try again|retry|provide|specify|supply|check (?:the|your)|use a valid|log ?in|sign (?:in|up)
        ...|subscribe|upgrade|include|pass|ensure|authenticate|enter a valid)\b
        (?:(?:this |the )?field|.{1,40} fields?) (?:is )?required$|(?:value|input) is not a|value error,
        ...|extra (?:fields|inputs) not|none is not an allowed|input should be
        you (?:must|need to) (?:provide|specify|supply|include|pass|be|log|sign|subscribe|set|enter)\b
        # The right to ask
        (?:your |the |this |an? )?(?:api[ _-]?key|(?:\w+[ _])?token|auth\w*|login|credentials?|session|signature
        ...|subscription|account|password|trial|licen[sc]e)\b[^.\n]{0,40}?\b(?:invalid|missing|required|expired|failed
        ...|denied|revoked|disabled|suspended|not (?:valid|found|provided|set|authori[sz]ed|allowed|active
        ...|recogni[sz]ed)|incorrect|rejected)\b
        (?:you|client|user|caller)(?: are|'re| is| do| does| have)?(?: currently)? ?(?:not|n't
        ...|no) (?:longer )?(?:authori[sz]ed|allowed|permitted|subscribed|have (?:permission|access|enough|the)
        ...|permission|access|logged|authenticated|eligible)
        this (?:endpoint|api|key|resource|feature|operation|method|action|tool|account|user|ip|request)(?: is| has
        ...| was)? (?:not|disabled|restricted|only|blocked|been|requires|deprecated|no longer|cannot)\b
        (?:access|permission|authentication|authori[sz]ation|login) (?:is |was |to \S+ |has been )?(?:denied|failed
        ...|required|refused|forbidden)(?:$|[:;,!(]|\. | (?:for|due|because|to)\b)
        not (?:authori[sz]ed|authenticated|logged in|permitted|allowed|subscribed)(?:$|[:.,;] | (?:to|for)\b)
        # What could not be done
        (?:(?:sorry|oops|unfortunately)[,.!:]? )?(?:(?:i|we|it|the (?:tool|server|api|system|function))(?: was| were
        ...| am|'m)? )?(?:failed to|unable to|could not|couldn't|cannot|can't|can not|not able to) (?:{DO}\b
        ...|\w+ (?:the |your |this |that |any |an? )?(?:\w+ )?{NOUN}\b)
        (?:\w+ )?(?:validation|operation|query|execution|request|call|lookup|parsing|transaction|upload|download
        ...|translation|conversion|search|login|import|job|task|tool|command|function|resolution
        ...|handshake)(?: \w+)? (?:has |was |is )?(?:failed|rejected|cancel+ed|aborted|refused)(?:$|[:;,!(]|\. 
        ...| (?:with|for|due|because|to|at|on)\b)
        (?:[^\s.,;:!?]+ ){0,4}?not[ _-]found(?:$|[!:;] |[.] | \(| (?:for|with|at|on this|in (?:the )?(?:database
        ...|system|index|list|registry|this))\b)
        (?:(?:the|this|that|your|an?|requested|specified|given|provided|required|path|parameter|field|argument
        ...|value) ){0,3}(?:{QUOTED}|{NOUN}|\w+_\w+|[\w-]*\d[\w-]*)(?: (?:{QUOTED}|\([^)\n]*\)
        ...|[\w.@-]+)){0,3}?:? {PREDICATE}
        \S+ (?:is not a valid|is a required|must be (?:one of|between|at (?:least|most)|greater|less|positive|non-
        ...|a (?:number|string|positive|valid)|an? integer|in |provided|specified|set)|cannot be (?:empty|null|blank
        ...|negative|zero)|should be (?:one of|between))
        (?:\S+ ){0,5}(?:(?:is|are) )?(?:not supported|unsupported)$
        not supported\b|none of the .{1,40}(?:found|match)|at least one .{1,60}(?:required|provided)
        ...|only .{1,60}(?:are|is) (?:supported|allowed)$
    """,
}


def _compile(table: str) -> re.Pattern:
    lines = (line.strip() for line in re.sub(r"\n\s*\.\.\.", "", table).split("\n"))
    pattern = "|".join(line for line in lines if line and not line.startswith("#"))
    for name, block in _BLOCKS.items():
        is_list = name in ("NOUN", "DO")
        block = f"(?:{'|'.join(block.split())})" if is_list else re.sub(r"\n\s*", "", block)
        pattern = pattern.replace("{" + name + "}", block)
    return re.compile(pattern.replace("$", r"\s*[.!]*\s*\Z"), re.IGNORECASE)


_PATTERNS = {rule: _compile(table) for rule, table in _TABLES.items()}
# `Error: <anything>`, but for a value of that name: "Error: none", "Mean error: 0.3".
_ERROR_COLON = re.compile(
    r"(?:\[error\]|(?:(?:fatal|internal|unknown|unexpected|api|server|runtime|syntax|parse|parsing|validation|network|"
    r"http|parameter|parameter type|client|database|sql|query|execution|tool|function|input|type|value|request|system|"
    r"script|command) )*error ?[:!]|error -) ?(?=\S)",
    re.IGNORECASE,
)
_LEAD_IN = re.compile(
    r"(?:exception|(?:i'm |i am |we're |we are )?sorry|oops|failed|failure|warning)[:,!] +", re.IGNORECASE
)
_TRACEBACK = "Traceback (most recent call last):"
_NONE = re.compile(
    r"(?:none|null|nil|n/?a|false|0+|ok(?:ay)?|success(?:ful(?:ly)?)?|undefined|2\d\d(?: ok)?|-+|none found|"
    r"(?:no|0|without|zero) (?:known )?(?:errors?|problems?|issues?|faults?)"
    r"(?: (?:found|occurred|detected|reported))?|)"
    r"\s*[.!]?\Z",
    re.IGNORECASE,
)
_NUMBER = re.compile(r"(?:\+/-|\u00b1)?\s*[-+]?\d+(?:[.,]\d+)?(?:e[-+]?\d+)?\s*%?\Z", re.IGNORECASE)


def says_none(text: str) -> bool:
    """Whether a text under the name "error" says that there was none: "", "None", "no errors found", "OK", "0"."""
    return len(text) < 60 and _NONE.match(text.strip()) is not None


def is_number(text: str) -> bool:
    """Whether a text is a number, as a deviation or a percentage is ("0.05", "3 %")."""
    return len(text) < 60 and _NUMBER.match(text.strip()) is not None


def match_error_text(text: str) -> tuple[str, str] | None:
    """(rule, the text or what of a long one reports it) of a text that reports an error as a whole, else None."""
    text = text.strip()
    start = text.find(_TRACEBACK)
    last_line = text[text.rfind("\n") + 1 :][:MAX_CHARACTERS]
    if start == 0 or start > 0 and text[start - 1] == "\n" and _PATTERNS["exception"].match(last_line):
        return "traceback", last_line
    if len(text) > MAX_CHARACTERS or text.count("\n") >= MAX_LINES:
        return None
    if match := _ERROR_COLON.match(text):
        value = text[match.end() :]
        return None if says_none(value) or is_number(value) and not re.match(r"[45]\d\d\b", value) else ("error:", text)
    if match := _LEAD_IN.match(text):
        text = text[match.end() :]
    for rule, pattern in _PATTERNS.items():
        if pattern.match(text):
            return rule, text
    return None
