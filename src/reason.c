/*
 * reason.c
 *		Where the reason of a change (X-Reason) comes from, and whether it is
 *		good enough.
 *
 * First found wins (operating procedure; CONTRACT "Settings"):
 *
 *	1. softmobile.reason set in this transaction: SET LOCAL or set_reason();
 *	2. header x-reason in PostgREST's request.headers;
 *	3. the row's reason column, where attach() named one;
 *	4. softmobile.reason from the session, the role, the database.
 *
 * A blank one counts as not found.  Length is counted in characters, after all
 * Unicode white space has been trimmed.
 *
 * Called by the capture trigger in the selling transaction, by the setting's
 * check hook, and by SQL functions.  Takes no lock and reads no table.
 */
#include "postgres.h"

#include "common/jsonapi.h"
#include "fmgr.h"
#include "guc.h"
#include "mb/pg_wchar.h"
#include "reason.h"
#include "utils/builtins.h"
#include "utils/fmgrprotos.h"
#include "utils/guc.h"
#include "utils/guc_tables.h"
#include "utils/memutils.h"

#include "compat.h"

PG_FUNCTION_INFO_V1(softmobile_set_reason);
PG_FUNCTION_INFO_V1(softmobile_current_reason);

/* The last request.headers seen and the x-reason in it, kept across calls. */
static char *headers_seen = NULL;
static char *headers_reason = NULL;

/* White_Space of Unicode, and the zero-width characters that look like nothing. */
static bool
is_blank(pg_wchar c)
{
	return (c >= 0x09 && c <= 0x0d) || c == 0x20 || c == 0x85 || c == 0xa0 ||
		c == 0x1680 || (c >= 0x2000 && c <= 0x200b) || c == 0x2028 || c == 0x2029 ||
		c == 0x202f || c == 0x205f || c == 0x2060 || c == 0x3000 || c == 0xfeff;
}

static bool
is_control(pg_wchar c)
{
	return c < 0x20 || (c >= 0x7f && c <= 0x9f);
}

/*
 * Code point of the character at p.  Where the server's encoding is not UTF-8,
 * single bytes stand for themselves and longer characters are never special.
 */
static pg_wchar
code_point(const char *p, int len)
{
	if (GetDatabaseEncoding() == PG_UTF8)
		return utf8_to_unicode((const unsigned char *) p);
	return len == 1 ? (unsigned char) *p : 0xfffd;
}

/* Finds where the text without blanks at its ends begins; returns its length. */
static size_t
trim_blanks(const char *text, const char **begin)
{
	const char *end = NULL;
	const char *end_of_text = text + strlen(text);

	*begin = NULL;
	for (const char *p = text; p < end_of_text;)
	{
		int			len = Min(pg_mblen(p), end_of_text - p);

		if (!is_blank(code_point(p, len)))
		{
			if (*begin == NULL)
				*begin = p;
			end = p + len;
		}
		p += len;
	}
	if (*begin == NULL)
	{
		*begin = text;
		return 0;
	}
	return end - *begin;
}

static const char *
find_problem(const char *begin, size_t size)
{
	if (size > SM_REASON_MAX)
		return "A reason has at most 2000 bytes.";
	for (const char *p = begin; p < begin + size;)
	{
		int			len = Min(pg_mblen(p), begin + size - p);

		if (is_control(code_point(p, len)))
			return "A reason has no control characters.";
		p += len;
	}
	return NULL;
}

/* All that there is to say of a text. */
typedef struct Verdict
{
	char	   *text;			/* as it came, for comparison; NULL: not kept */
	int			encoding;		/* the postmaster's is not the database's */
	size_t		begin;			/* of the trimmed text */
	size_t		size;
	const char *problem;		/* NULL: it could be a reason */
	bool		suffices;
} Verdict;

/* The rows of a statement have the same reason: the latest verdict is kept. */
static const Verdict *
judge(const char *text)
{
	static Verdict verdict = {.text = NULL};
	const char *begin;

	if (verdict.text != NULL && verdict.encoding == GetDatabaseEncoding() && strcmp(verdict.text, text) == 0)
		return &verdict;
	if (verdict.text != NULL)
		pfree(verdict.text);
	verdict.text = NULL;
	verdict.encoding = GetDatabaseEncoding();
	verdict.size = trim_blanks(text, &begin);
	verdict.begin = begin - text;
	verdict.problem = find_problem(begin, verdict.size);
	verdict.suffices = pg_mbstrlen_with_len(begin, verdict.size) >= SM_REASON_MIN_CHARS;
	if (verdict.problem == NULL)
		verdict.text = MemoryContextStrdup(TopMemoryContext, text);
	return &verdict;
}

const char *
sm_reason_problem(const char *text)
{
	return judge(text)->problem;
}

char *
sm_reason_trim(const char *text)
{
	const Verdict *verdict = judge(text);

	return pnstrdup(text + verdict->begin, verdict->size);
}

bool
sm_reason_suffices(const char *text)
{
	return judge(text)->suffices;
}

/*
 * True when the value in force was set for this transaction only, so that it
 * cannot be a leftover of the connection's previous user.  The setting's stack
 * is the one place that knows.
 */
static bool
reason_is_local(void)
{
	static struct config_generic *setting = NULL;

	if (setting == NULL)
		setting = find_option("softmobile.reason", false, true, 0);
	return setting != NULL && setting->stack != NULL && setting->stack->state != GUC_SET;
}

/* x-reason in headers, in the current memory context, or NULL. */
static char *
find_reason(const char *headers)
{
	JsonLexContext *lex = makeJsonLexContextCstringLen(NULL, headers, strlen(headers),
													   GetDatabaseEncoding(), true);
	Datum		value;
	LOCAL_FCINFO(fcinfo, 2);

	/* What is no JSON holds no reason; the parser below would make the sale fail for it. */
	if (pg_parse_json(lex, &nullSemAction) != JSON_SUCCESS)
		return NULL;

	InitFunctionCallInfoData(*fcinfo, NULL, 2, InvalidOid, NULL, NULL);
	fcinfo->args[0].value = CStringGetTextDatum(headers);
	fcinfo->args[0].isnull = false;
	fcinfo->args[1].value = CStringGetTextDatum("x-reason");
	fcinfo->args[1].isnull = false;
	value = json_object_field_text(fcinfo);
	return fcinfo->isnull ? NULL : TextDatumGetCString(value);
}

/* x-reason of PostgREST's headers, or NULL; valid until the headers change. */
static const char *
reason_from_headers(void)
{
	const char *headers = GetConfigOption("request.headers", true, false);
	char	   *reason;

	if (headers == NULL || headers[0] == '\0')
		return NULL;
	if (headers_seen != NULL && strcmp(headers, headers_seen) == 0)
		return headers_reason;

	reason = find_reason(headers);
	if (headers_seen)
		pfree(headers_seen);
	if (headers_reason)
		pfree(headers_reason);
	headers_seen = headers_reason = NULL;
	if (reason != NULL)
		headers_reason = MemoryContextStrdup(TopMemoryContext, reason);
	headers_seen = MemoryContextStrdup(TopMemoryContext, headers);
	return headers_reason;
}

char *
sm_reason_current(const char *row_reason)
{
	bool		local = reason_is_local();
	const char *candidates[4];

	candidates[0] = local ? sm_reason : NULL;
	candidates[1] = NULL;		/* the headers are parsed only when they count */
	candidates[2] = row_reason;
	candidates[3] = sm_reason;

	for (int i = 0; i < lengthof(candidates); i++)
	{
		if (i == 1)
			candidates[i] = reason_from_headers();
		if (candidates[i] != NULL && judge(candidates[i])->size > 0)
			return sm_reason_trim(candidates[i]);
	}
	return NULL;
}

/*
 * softmobile.set_reason(text) -> void
 *
 * The reason of the rest of this transaction; it does not outlive it.
 */
Datum
softmobile_set_reason(PG_FUNCTION_ARGS)
{
	char	   *reason;
	const char *problem;

	if (PG_ARGISNULL(0))
		ereport(ERROR,
				(errcode(ERRCODE_NULL_VALUE_NOT_ALLOWED),
				 errmsg("reason must not be NULL"),
				 errhint("State in one line why the change is made.")));
	reason = text_to_cstring(PG_GETARG_TEXT_PP(0));
	problem = sm_reason_problem(reason);
	if (problem != NULL)
		ereport(ERROR,
				(errcode(ERRCODE_INVALID_PARAMETER_VALUE),
				 errmsg("reason cannot be used"),
				 errdetail("%s", problem),
				 errhint("State in one line why the change is made.")));
	reason = sm_reason_trim(reason);
	if (!sm_reason_suffices(reason))
		ereport(ERROR,
				(errcode(ERRCODE_CHECK_VIOLATION),
				 errmsg("X-Reason required: at least %d characters", SM_REASON_MIN_CHARS),
				 errdetail("White space at the ends does not count."),
				 errhint("State in one line why the change is made.")));

	(void) set_config_option("softmobile.reason", reason, PGC_USERSET, PGC_S_SESSION,
							 GUC_ACTION_LOCAL, true, 0, false);
	PG_RETURN_VOID();
}

/*
 * softmobile.current_reason() -> text
 *
 * The reason that a change would carry now (a row's own column apart), or NULL.
 */
Datum
softmobile_current_reason(PG_FUNCTION_ARGS)
{
	char	   *reason = sm_reason_current(NULL);

	if (reason == NULL)
		PG_RETURN_NULL();
	PG_RETURN_TEXT_P(cstring_to_text(reason));
}
