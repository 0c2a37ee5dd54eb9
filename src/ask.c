/*
 * ask.c
 *		One HTTP question to central, asked and waited for by a user's backend.
 *
 * Called through the SQL functions of 45-ask.sql, within the caller's transaction;
 * holds no lock, ends with the caller's cancel, and when nothing has arrived for
 * softmobile.request_timeout.  Events never go this way: they are the worker's.
 * What central, the link or the configuration do is an outcome, not an ERROR.
 */
#include "postgres.h"

#include "access/genam.h"
#include "access/htup_details.h"
#include "access/table.h"
#include "catalog/indexing.h"
#include "catalog/pg_db_role_setting.h"
#include "catalog/pg_type.h"
#include "delivery.h"
#include "fmgr.h"
#include "funcapi.h"
#include "guc.h"
#include "http.h"
#include "mb/pg_wchar.h"
#include "miscadmin.h"
#include "sign.h"
#include "storage/latch.h"
#include "utils/array.h"
#include "utils/builtins.h"
#include "utils/fmgroids.h"
#include "utils/guc_tables.h"
#include "utils/rel.h"
#include "utils/timestamp.h"
#include "utils/wait_event.h"

#include "compat.h"

#define ASK_COLUMNS			8
#define MAX_ANSWER			(256 * 1024 * 1024)

PG_FUNCTION_INFO_V1(softmobile_ask_central);
PG_FUNCTION_INFO_V1(softmobile_database_setting);

/* ----------
 * Settings
 * ----------
 */

/* What ALTER DATABASE ... SET says of a setting now; NULL: nothing. */
static char *
setting_of_database(const char *name)
{
	char	   *found = NULL;
	Relation	rel;
	SysScanDesc scan;
	ScanKeyData keys[2];
	HeapTuple	tuple;
	size_t		len = strlen(name);

	rel = table_open(DbRoleSettingRelationId, AccessShareLock);
	ScanKeyInit(&keys[0], Anum_pg_db_role_setting_setdatabase, BTEqualStrategyNumber, F_OIDEQ,
				ObjectIdGetDatum(MyDatabaseId));
	ScanKeyInit(&keys[1], Anum_pg_db_role_setting_setrole, BTEqualStrategyNumber, F_OIDEQ,
				ObjectIdGetDatum(InvalidOid));
	scan = systable_beginscan(rel, DbRoleSettingDatidRolidIndexId, true, NULL, 2, keys);
	while (HeapTupleIsValid(tuple = systable_getnext(scan)))
	{
		bool		is_null;
		Datum		config = heap_getattr(tuple, Anum_pg_db_role_setting_setconfig, RelationGetDescr(rel), &is_null);
		Datum	   *settings;
		int			n;

		if (is_null)
			continue;
		deconstruct_array(DatumGetArrayTypeP(config), TEXTOID, -1, false, TYPALIGN_INT, &settings, NULL, &n);
		for (int i = 0; i < n; i++)
		{
			char	   *setting = TextDatumGetCString(settings[i]);

			if (pg_strncasecmp(setting, name, len) == 0 && setting[len] == '=')
				found = setting + len + 1;
		}
	}
	systable_endscan(scan);
	table_close(rel, AccessShareLock);
	return found;
}

/*
 * A setting as a session that begins now would have it, unless this session has set
 * it: who has just configured the database need not connect anew to try it.
 */
static char *
setting_now(const char *name, char *value)
{
	struct config_generic *record = find_option(name, false, true, 0);
	char	   *of_database;

	if (record == NULL || record->source >= PGC_S_SESSION)
		return value;
	of_database = setting_of_database(name);
	return of_database ? of_database : value;
}

/* softmobile.database_setting(name text) -> text; ours only, and none that is secret */
Datum
softmobile_database_setting(PG_FUNCTION_ARGS)
{
	char	   *name = text_to_cstring(PG_GETARG_TEXT_PP(0));

	if (strcmp(name, "softmobile.central_url") == 0)
		PG_RETURN_TEXT_P(cstring_to_text(setting_now(name, sm_central_url)));
	if (strcmp(name, "softmobile.branch_id") == 0)
		PG_RETURN_TEXT_P(cstring_to_text(setting_now(name, sm_branch_id)));
	elog(ERROR, "unexpected setting \"%s\"", name);
}

/* ----------
 * Asking
 * ----------
 */

/* libcurl, at the first question of this backend. */
static void
prepare_http(void)
{
	static bool tried = false;
	static bool ready = false;
	SmHttpSettings settings = {
		.ca_file = sm_ca_file,
		.client_cert_file = sm_client_cert_file,
		.client_key_file = sm_client_key_file,
		.networks = sm_central_networks,
		.user_agent = "softmobile/" SOFTMOBILE_VERSION,
	};

	if (ready)
	{
		sm_http_configure(&settings);
		return;
	}
	if (tried)
		ereport(ERROR,
				(errcode(ERRCODE_EXTERNAL_ROUTINE_EXCEPTION),
				 errmsg("libcurl could not be initialized in this session"),
				 errhint("Connect again and try once more.")));
	tried = true;
	sm_http_init(&settings);
	ready = true;
}

static void
wait_for_result(SmHttpResult *result)
{
	static uint32 wait_event = 0;

	if (wait_event == 0)
		wait_event = WaitEventExtensionNew("SoftmobileAsk");
	for (;;)
	{
		long		timeout;
		int			events = WL_LATCH_SET | WL_SOCKET_READABLE | WL_EXIT_ON_PM_DEATH;

		CHECK_FOR_INTERRUPTS();
		sm_http_run();
		if (sm_http_next_result(result))
			return;
		timeout = sm_http_timeout_ms();
		if (timeout >= 0)
			events |= WL_TIMEOUT;
		if (WaitLatchOrSocket(MyLatch, events, sm_http_fd(), timeout, wait_event) & WL_LATCH_SET)
			ResetLatch(MyLatch);
	}
}

static const char *
outcome_word(SmHttpOutcome outcome)
{
	switch (outcome)
	{
		case SM_HTTP_ANSWERED:
			return "answered";
		case SM_HTTP_OFFLINE:
			return "offline";
		case SM_HTTP_TLS:
			return "tls";
		case SM_HTTP_PROTOCOL:
			return "protocol";
		case SM_HTTP_UNUSABLE:
			return "configuration";
	}
	return NULL;				/* keeps the compiler quiet */
}

/* What cannot be a text turns the answer into a violation of the protocol. */
static text *
answer_text(SmHttpResult *result)
{
	const char *problem = NULL;

	if (result->outcome != SM_HTTP_ANSWERED)
		return NULL;
	if (strlen(result->body) != result->body_len)
		problem = "answer holds a zero byte";
	else if (!pg_verify_mbstr(PG_UTF8, result->body, result->body_len, true))
		problem = "answer is not UTF-8";
	if (problem != NULL)
	{
		result->outcome = SM_HTTP_PROTOCOL;
		result->status = 0;
		strlcpy(result->error, problem, sizeof(result->error));
		return NULL;
	}
	return cstring_to_text(pg_any_to_server(result->body, result->body_len, PG_UTF8));
}

static Datum
form_result(FunctionCallInfo fcinfo, SmHttpResult *result)
{
	TupleDesc	desc;
	Datum		values[ASK_COLUMNS] = {0};
	bool		nulls[ASK_COLUMNS] = {false};
	text	   *answer;

	if (get_call_result_type(fcinfo, NULL, &desc) != TYPEFUNC_COMPOSITE)
		elog(ERROR, "return type must be a row type");
	answer = answer_text(result);

	values[0] = CStringGetTextDatum(outcome_word(result->outcome));
	values[1] = Int32GetDatum((int32) result->status);
	values[2] = PointerGetDatum(answer);
	values[3] = CStringGetTextDatum(result->content_type);
	values[4] = TimestampTzGetDatum(time_t_to_timestamptz((pg_time_t) result->date));
	values[5] = Int64GetDatum(result->total_ms);
	values[6] = CStringGetTextDatum(result->certificate_until);
	values[7] = CStringGetTextDatum(result->error);
	nulls[1] = nulls[2] = nulls[3] = answer == NULL;
	nulls[4] = result->date == 0;
	nulls[6] = result->certificate_until[0] == '\0';
	nulls[7] = result->error[0] == '\0';
	return HeapTupleGetDatum(heap_form_tuple(desc, values, nulls));
}

/*
 * softmobile.ask(url text, method text, body text, max_bytes bigint)
 *		-> (outcome, status, answer, content_type, server_time, milliseconds, certificate_until, error)
 */
Datum
softmobile_ask_central(PG_FUNCTION_ARGS)
{
	SmHttpResult result = {0};
	SmHttpRequest request = {
		.url = text_to_cstring(PG_GETARG_TEXT_PP(0)),
		.method = text_to_cstring(PG_GETARG_TEXT_PP(1)),
		.connect_timeout_ms = sm_connect_timeout,
		.request_timeout_ms = sm_request_timeout,
		.max_response = Min(Max(PG_GETARG_INT64(3), 0), MAX_ANSWER),
		.single = true,
		.tag = &result,
	};
	const char *problem;
	char	   *token;

	if (!PG_ARGISNULL(2))
	{
		char	   *body = text_to_cstring(PG_GETARG_TEXT_PP(2));

		request.body = pg_server_to_any(body, strlen(body), PG_UTF8);
		request.body_len = strlen(request.body);
		request.content_type = "application/json; charset=UTF-8";
	}
	problem = sm_endpoint_token(setting_now("softmobile.auth_token_file", sm_auth_token_file), &token);
	if (problem == NULL && request.body != NULL)
		problem = sm_sign_request(&request, NULL);
	if (problem != NULL)
	{
		result.outcome = SM_HTTP_UNUSABLE;
		strlcpy(result.error, problem, sizeof(result.error));
		PG_RETURN_DATUM(form_result(fcinfo, &result));
	}
	request.bearer = token;

	prepare_http();
	if (!sm_http_submit(&request))
		elog(ERROR, "too many HTTP requests in one backend");
	PG_TRY();
	{
		wait_for_result(&result);
	}
	PG_CATCH();
	{
		(void) sm_http_cancel(&result);
		PG_RE_THROW();
	}
	PG_END_TRY();
	PG_RETURN_DATUM(form_result(fcinfo, &result));
}
