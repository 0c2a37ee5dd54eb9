/*
 * transport_test.c
 *		The transport, driven from SQL: for tests only.
 *
 * Stands where the sync worker stands: it runs the event loop of http.c and
 * hands events to wire.c.
 */
#include "postgres.h"

#include "executor/spi.h"
#include "fmgr.h"
#include "funcapi.h"
#include "http.h"
#include "mb/pg_wchar.h"
#include "miscadmin.h"
#include "pgstat.h"
#include "portability/instr_time.h"
#include "storage/latch.h"
#include "utils/array.h"
#include "utils/builtins.h"
#include "utils/memutils.h"
#include "utils/timestamp.h"
#include "wire.h"

PG_MODULE_MAGIC;

static bool initialized = false;

static void
initialize(const SmHttpSettings *settings)
{
	SmHttpSettings none = { 0 };

	none.user_agent = "softmobile/test";
	if (settings == NULL)
		settings = &none;
	if (initialized)
		sm_http_configure(settings);
	else
		sm_http_init(settings);
	initialized = true;
}

static char *
text_arg(FunctionCallInfo fcinfo, int i)
{
	return PG_ARGISNULL(i) ? NULL : text_to_cstring(PG_GETARG_TEXT_PP(i));
}

static double
elapsed_ms(instr_time start)
{
	instr_time	now;

	INSTR_TIME_SET_CURRENT(now);
	INSTR_TIME_SUBTRACT(now, start);
	return INSTR_TIME_GET_MILLISEC(now);
}

/* One turn of the event loop: sleep, then let libcurl work.  Returns how long that took. */
static double
turn(long limit_ms)
{
	long		timeout = sm_http_timeout_ms();
	instr_time	start;

	if (timeout < 0 || timeout > limit_ms)
		timeout = limit_ms;
	(void) WaitLatchOrSocket(MyLatch,
							 WL_LATCH_SET | WL_SOCKET_READABLE | WL_TIMEOUT | WL_EXIT_ON_PM_DEATH,
							 sm_http_fd(), timeout, PG_WAIT_EXTENSION);
	ResetLatch(MyLatch);
	CHECK_FOR_INTERRUPTS();
	INSTR_TIME_SET_CURRENT(start);
	sm_http_run();
	return elapsed_ms(start);
}

static const char *
outcome_name(SmHttpOutcome outcome)
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
			return "unusable";
	}
	return "unknown";
}

PG_FUNCTION_INFO_V1(http_configure);
Datum
http_configure(PG_FUNCTION_ARGS)
{
	SmHttpSettings settings = { 0 };

	settings.ca_file = text_arg(fcinfo, 0);
	settings.client_cert_file = text_arg(fcinfo, 1);
	settings.client_key_file = text_arg(fcinfo, 2);
	settings.networks = text_arg(fcinfo, 3);
	settings.user_agent = "softmobile/test";
	initialize(&settings);
	PG_RETURN_VOID();
}

PG_FUNCTION_INFO_V1(http_request);
Datum
http_request(PG_FUNCTION_ARGS)
{
	SmHttpRequest request = { 0 };
	SmHttpResult result;
	TupleDesc	tupdesc;
	Datum		values[9];
	bool		nulls[9] = { 0 };
	volatile double longest = 0;
	int			tag;

	if (get_call_result_type(fcinfo, NULL, &tupdesc) != TYPEFUNC_COMPOSITE)
		elog(ERROR, "return type must be a row type");
	if (!initialized)
		initialize(NULL);

	request.method = text_arg(fcinfo, 0);
	request.url = text_arg(fcinfo, 1);
	if (!PG_ARGISNULL(2))
	{
		bytea	   *body = PG_GETARG_BYTEA_PP(2);

		request.body = VARDATA_ANY(body);
		request.body_len = VARSIZE_ANY_EXHDR(body);
	}
	request.content_type = text_arg(fcinfo, 3);
	request.content_encoding = text_arg(fcinfo, 4);
	request.bearer = text_arg(fcinfo, 5);
	request.idempotency_key = text_arg(fcinfo, 6);
	request.reason = text_arg(fcinfo, 7);
	request.traceparent = text_arg(fcinfo, 8);
	request.connect_timeout_ms = PG_GETARG_INT32(9);
	request.request_timeout_ms = PG_GETARG_INT32(10);
	request.max_response = PG_GETARG_INT32(11);
	request.tag = &tag;

	PG_TRY();
	{
		if (!sm_http_submit(&request))
			elog(ERROR, "too many requests");
		while (!sm_http_next_result(&result))
			longest = Max(longest, turn(1000));
	}
	PG_CATCH();
	{
		/* the body is about to go */
		sm_http_cancel(&tag);
		PG_RE_THROW();
	}
	PG_END_TRY();

	if (result.tag != &tag)
		elog(ERROR, "somebody else's result");

	values[0] = CStringGetTextDatum(outcome_name(result.outcome));
	values[1] = Int32GetDatum((int) result.status);
	values[2] = CStringGetTextDatum(result.content_type);
	values[3] = Int64GetDatum(result.retry_after_ms);
	values[4] = Int64GetDatum(result.date);
	values[5] = Int64GetDatum(result.total_ms);
	values[6] = CStringGetTextDatum(result.error);
	values[7] = CStringGetTextDatum(result.body);
	values[8] = Float8GetDatum(longest);
	PG_RETURN_DATUM(HeapTupleGetDatum(heap_form_tuple(tupdesc, values, nulls)));
}

/* Submit n requests, tagged with pointers into tags. */
static int
submit_many(const char *url, int n, int request_ms, char *tags)
{
	SmHttpRequest request = { 0 };
	int			accepted = 0;

	if (!initialized)
		initialize(NULL);
	request.method = "GET";
	request.url = url;
	request.request_timeout_ms = request_ms;
	request.max_response = 1024;
	for (int i = 0; i < n; i++)
	{
		request.tag = tags + i;
		if (sm_http_submit(&request))
			accepted++;
	}
	return accepted;
}

PG_FUNCTION_INFO_V1(http_parallel);
Datum
http_parallel(PG_FUNCTION_ARGS)
{
	int			n = PG_GETARG_INT32(1);
	char	   *tags = palloc0(n);
	int			counts[SM_HTTP_UNUSABLE + 1] = { 0 };
	int			accepted = submit_many(text_arg(fcinfo, 0), n, PG_GETARG_INT32(2), tags);
	ArrayBuildState *result = NULL;
	SmHttpResult answer;

	for (int taken = 0; taken < accepted;)
	{
		turn(1000);
		while (sm_http_next_result(&answer))
		{
			char	   *tag = (char *) answer.tag;

			if (tag < tags || tag >= tags + n || *tag != 0)
				elog(ERROR, "a result came twice, or is not ours");
			*tag = 1;
			counts[answer.outcome]++;
			taken++;
		}
	}
	result = accumArrayResult(result, CStringGetTextDatum(psprintf("accepted %d", accepted)),
							  false, TEXTOID, CurrentMemoryContext);
	for (int i = 0; i < lengthof(counts); i++)
	{
		if (counts[i] > 0)
			result = accumArrayResult(result,
									  CStringGetTextDatum(psprintf("%s %d", outcome_name(i), counts[i])),
									  false, TEXTOID, CurrentMemoryContext);
	}
	PG_RETURN_DATUM(makeArrayResult(result, CurrentMemoryContext));
}

PG_FUNCTION_INFO_V1(http_cancel);
Datum
http_cancel(PG_FUNCTION_ARGS)
{
	int			n = PG_GETARG_INT32(1);
	char	   *tags = palloc0(n);
	Datum		values[3];
	int			accepted = submit_many(text_arg(fcinfo, 0), n, 30000, tags);
	int			cancelled = 0;
	int			answered = 0;
	instr_time	start;
	SmHttpResult answer;

	INSTR_TIME_SET_CURRENT(start);
	do
		turn(10);
	while (elapsed_ms(start) < PG_GETARG_INT32(2));
	for (int i = 0; i < n; i++)
	{
		if (sm_http_cancel(tags + i))
			cancelled++;
	}
	turn(10);
	while (sm_http_next_result(&answer))
		answered++;

	values[0] = Int32GetDatum(accepted);
	values[1] = Int32GetDatum(cancelled);
	values[2] = Int32GetDatum(answered);
	PG_RETURN_ARRAYTYPE_P(construct_array(values, 3, INT4OID, sizeof(int32), true, TYPALIGN_INT));
}

/* ---------------------------------------------------------------------------
 * wire.c
 * ------------------------------------------------------------------------ */

static char *
column_text(HeapTuple tuple, TupleDesc desc, const char *name)
{
	int			column = SPI_fnumber(desc, name);

	if (column <= 0)
		elog(ERROR, "the query has no column %s", name);
	return SPI_getvalue(tuple, desc, column);
}

static Datum
column_datum(HeapTuple tuple, TupleDesc desc, const char *name)
{
	bool		isnull;

	return SPI_getbinval(tuple, desc, SPI_fnumber(desc, name), &isnull);
}

/* The events that a query gives, in the caller's SPI context. */
static SmEvent *
query_events(const char *query, int *n)
{
	SmEvent    *events;

	if (SPI_execute(query, true, 0) != SPI_OK_SELECT)
		elog(ERROR, "not a query");
	*n = (int) SPI_processed;
	events = palloc0(sizeof(SmEvent) * Max(*n, 1));
	for (int i = 0; i < *n; i++)
	{
		HeapTuple	tuple = SPI_tuptable->vals[i];
		TupleDesc	desc = SPI_tuptable->tupdesc;
		SmEvent    *e = &events[i];

		e->seq = DatumGetInt64(column_datum(tuple, desc, "seq"));
		e->id = *DatumGetUUIDP(column_datum(tuple, desc, "id"));
		e->op = column_text(tuple, desc, "op")[0];
		e->entity_type = column_text(tuple, desc, "entity_type");
		e->entity_id = column_text(tuple, desc, "entity_id");
		e->branch_id = column_text(tuple, desc, "branch_id");
		e->created_at = DatumGetTimestampTz(column_datum(tuple, desc, "created_at"));
		e->reason = column_text(tuple, desc, "reason");
		e->actor = column_text(tuple, desc, "actor");
		e->payload = column_text(tuple, desc, "payload");
		e->payload_len = strlen(e->payload);
		e->resolution = column_text(tuple, desc, "resolution");
	}
	return events;
}

PG_FUNCTION_INFO_V1(wire_body);
Datum
wire_body(PG_FUNCTION_ARGS)
{
	char	   *lane = text_arg(fcinfo, 2);
	char	   *epoch = text_arg(fcinfo, 3);
	MemoryContext caller = CurrentMemoryContext;
	ArrayBuildState *errors = NULL;
	TupleDesc	tupdesc;
	SmBody		body;
	SmEvent    *events;
	Datum		values[5];
	bool		nulls[5] = { 0 };
	bytea	   *bytes;
	int			n;

	if (get_call_result_type(fcinfo, NULL, &tupdesc) != TYPEFUNC_COMPOSITE)
		elog(ERROR, "return type must be a row type");

	SPI_connect();
	events = query_events(text_arg(fcinfo, 0), &n);
	sm_wire_begin(&body, PG_GETARG_INT32(1));
	for (int i = 0; i < n; i++)
	{
		if (!sm_wire_add(&body, &events[i], lane, epoch, PG_GETARG_INT32(4)))
			errors = accumArrayResult(errors, CStringGetTextDatum(body.error), false, TEXTOID,
									  caller);
	}
	sm_wire_end(&body);
	if (sm_wire_size(&body) != body.out.len)
		elog(ERROR, "the size is not the size");
	if (!PG_GETARG_INT32(1) && body.raw_len != body.out.len)
		elog(ERROR, "the raw size is not the size");

	MemoryContextSwitchTo(caller);
	bytes = palloc(VARHDRSZ + body.out.len);
	SET_VARSIZE(bytes, VARHDRSZ + body.out.len);
	memcpy(VARDATA(bytes), body.out.data, body.out.len);
	values[0] = PointerGetDatum(bytes);
	values[1] = Int64GetDatum(body.raw_len);
	values[2] = Int32GetDatum(body.nevents);
	nulls[3] = sm_wire_encoding(&body) == NULL;
	values[3] = nulls[3] ? (Datum) 0 : CStringGetTextDatum(sm_wire_encoding(&body));
	nulls[4] = errors == NULL;
	values[4] = nulls[4] ? (Datum) 0 : makeArrayResult(errors, caller);
	sm_wire_free(&body);
	SPI_finish();
	PG_RETURN_DATUM(HeapTupleGetDatum(heap_form_tuple(tupdesc, values, nulls)));
}

PG_FUNCTION_INFO_V1(wire_key);
Datum
wire_key(PG_FUNCTION_ARGS)
{
	char	   *epoch = text_arg(fcinfo, 1);
	char	   *lane = text_arg(fcinfo, 2);
	char		key[SM_WIRE_KEY_LEN];
	SmEvent    *events;
	int			n;

	SPI_connect();
	events = query_events(text_arg(fcinfo, 0), &n);
	sm_wire_idempotency_key(key, epoch, lane, events, n);
	SPI_finish();
	PG_RETURN_TEXT_P(cstring_to_text(key));
}

PG_FUNCTION_INFO_V1(wire_receipt);
Datum
wire_receipt(PG_FUNCTION_ARGS)
{
	bytea	   *body = PG_GETARG_BYTEA_PP(0);
	ArrayBuildState *verdicts = NULL;
	TupleDesc	tupdesc;
	SmReceipt	receipt;
	SmEvent    *events;
	Datum	   *ids;
	Datum		values[5];
	bool		nulls[5] = { 0 };
	bool		ok;
	int			n;

	if (get_call_result_type(fcinfo, NULL, &tupdesc) != TYPEFUNC_COMPOSITE)
		elog(ERROR, "return type must be a row type");
	deconstruct_array(PG_GETARG_ARRAYTYPE_P(1), UUIDOID, UUID_LEN, false, TYPALIGN_CHAR, &ids,
					  NULL, &n);
	events = palloc0(sizeof(SmEvent) * Max(n, 1));
	for (int i = 0; i < n; i++)
		events[i].id = *DatumGetUUIDP(ids[i]);

	ok = sm_wire_receipt(VARDATA_ANY(body), VARSIZE_ANY_EXHDR(body), events, n, &receipt);
	for (int i = 0; i < receipt.nverdicts; i++)
	{
		char	   *line = psprintf("%d %s <%s> %s", receipt.verdicts[i].event,
									receipt.verdicts[i].conflict ? "conflict" : "rejected",
									receipt.verdicts[i].detail,
									receipt.verdicts[i].current ? receipt.verdicts[i].current : "-");

		verdicts = accumArrayResult(verdicts, CStringGetTextDatum(line), false, TEXTOID,
									CurrentMemoryContext);
	}
	if (ok == (receipt.error[0] != '\0'))
		elog(ERROR, "result and error differ");

	values[0] = BoolGetDatum(ok);
	values[1] = Int32GetDatum(receipt.accepted);
	values[2] = Int32GetDatum(receipt.duplicates);
	values[3] = CStringGetTextDatum(receipt.error);
	nulls[4] = verdicts == NULL;
	values[4] = nulls[4] ? (Datum) 0 : makeArrayResult(verdicts, CurrentMemoryContext);
	PG_RETURN_DATUM(HeapTupleGetDatum(heap_form_tuple(tupdesc, values, nulls)));
}

PG_FUNCTION_INFO_V1(wire_problem);
Datum
wire_problem(PG_FUNCTION_ARGS)
{
	bytea	   *body = PG_GETARG_BYTEA_PP(0);
	char	   *detail = sm_wire_problem(VARDATA_ANY(body), VARSIZE_ANY_EXHDR(body),
										 text_arg(fcinfo, 1));

	if (detail == NULL)
		PG_RETURN_NULL();
	PG_RETURN_TEXT_P(cstring_to_text(detail));
}

PG_FUNCTION_INFO_V1(wire_traceparent);
Datum
wire_traceparent(PG_FUNCTION_ARGS)
{
	char		out[SM_WIRE_TRACEPARENT_LEN];

	sm_wire_traceparent(out, (uint8 *) VARDATA_ANY(PG_GETARG_BYTEA_PP(0)));
	PG_RETURN_TEXT_P(cstring_to_text(out));
}

PG_FUNCTION_INFO_V1(wire_speed);
Datum
wire_speed(PG_FUNCTION_ARGS)
{
	SmEvent		event = { 0 };
	SmBody		body;
	instr_time	start;

	event.op = 'i';
	event.entity_type = "sale";
	event.entity_id = "10002345";
	event.branch_id = "12";
	event.created_at = GetCurrentTimestamp();
	event.reason = "Venta de mostrador";
	event.actor = "pos";
	event.payload = text_arg(fcinfo, 1);
	event.payload_len = strlen(event.payload);

	INSTR_TIME_SET_CURRENT(start);
	for (int n = PG_GETARG_INT32(0); n > 0; n -= 500)
	{
		sm_wire_begin(&body, PG_GETARG_INT32(2));
		for (int i = 0; i < Min(n, 500); i++)
		{
			event.seq++;
			if (!sm_wire_add(&body, &event, "high", "00000000-0000-4000-8000-000000000001", 1))
				elog(ERROR, "%s", body.error);
		}
		sm_wire_end(&body);
		sm_wire_free(&body);
	}
	PG_RETURN_FLOAT8(elapsed_ms(start));
}
