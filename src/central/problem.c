/*
 * problem.c
 *		Answers and log lines.
 *
 * Errors are application/problem+json as RFC 9457 has it.  Called by all threads;
 * holds no state.
 */
#include "gateway.h"

#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#include <jansson.h>
#include <microhttpd.h>

/* A well-formed answer for when there is no memory left to build one. */
static const char last_resort[] = "{\"type\":\"about:blank\",\"title\":\"Service Unavailable\",\"status\":503}";

Answer
answer_ok(char *body)
{
	Answer		answer = {.status = 200, .body = body};

	return answer;
}

Answer
answer_problem(int status, const char *detail)
{
	Answer		answer = {.status = status, .problem = true};
	json_t	   *problem = json_pack("{s:s, s:s, s:i}", "type", "about:blank",
									"title", MHD_get_reason_phrase_for((unsigned int) status), "status", status);

	if (problem != NULL && detail != NULL)
	{
		/* what is no UTF-8 is left out rather than sent */
		json_t	   *text = json_string(detail);

		if (text != NULL)
			json_object_set_new(problem, "detail", text);
	}
	if (problem != NULL)
		answer.body = json_dumps(problem, JSON_COMPACT);
	json_decref(problem);
	if (answer.body == NULL)
	{
		answer.status = 503;
		answer.body = strdup(last_resort);
	}
	if (answer.status == 503)
		answer.retry_after = 2;
	return answer;
}

/* A copy without body stands for one that could not be made. */
Answer
answer_copy(const Answer *answer)
{
	Answer		copy = *answer;

	copy.body = answer->body ? strdup(answer->body) : NULL;
	return copy;
}

void
answer_free(Answer *answer)
{
	free(answer->body);
	answer->body = NULL;
}

/* One line, whatever is in it: nobody may write lines of his own into the log. */
void
log_line(const char *fmt,...)
{
	char		stamp[32];
	char		line[1024];
	struct timespec now;
	struct tm	tm;
	va_list		args;

	va_start(args, fmt);
	vsnprintf(line, sizeof(line), fmt, args);
	va_end(args);
	for (char *c = line; *c != '\0'; c++)
		if ((unsigned char) *c < ' ' || *c == 127)
			*c = ' ';
	clock_gettime(CLOCK_REALTIME, &now);
	gmtime_r(&now.tv_sec, &tm);
	strftime(stamp, sizeof(stamp), "%Y-%m-%dT%H:%M:%S", &tm);
	fprintf(stderr, "%s.%03ldZ %s\n", stamp, now.tv_nsec / 1000000, line);
}
