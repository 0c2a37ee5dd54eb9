/*
 * http_outcome.c
 *		What the end of a transfer means: libcurl's codes and an answer's
 *		headers, put into the five outcomes that the worker decides by.
 *
 * Called by http.c alone, with signals blocked; allocates nothing and throws
 * nothing.
 *
 * Error texts are our own, because libcurl's may quote pieces of a mistyped
 * URL, passwords included; only where it speaks of certificates and files is
 * its own text worth having.
 */
#include "postgres.h"

#include <ctype.h>
#include <curl/curl.h>

#include "http_outcome.h"

#define MAX_RETRY_AFTER_MS INT64CONST(86400000)

typedef struct CodeMeaning
{
	CURLcode	code;
	SmHttpOutcome outcome;
	bool		quote_curl;
	const char *text;
} CodeMeaning;

static const CodeMeaning code_meanings[] = {
	/* the link is down, or the other end is */
	{ CURLE_COULDNT_RESOLVE_HOST, SM_HTTP_OFFLINE, false, "host name not found" },
	{ CURLE_COULDNT_CONNECT, SM_HTTP_OFFLINE, false, "could not connect" },
	{ CURLE_OPERATION_TIMEDOUT, SM_HTTP_OFFLINE, false, "timed out" },
	/* without one byte of an answer nobody can tell what arrived */
	{ CURLE_SEND_ERROR, SM_HTTP_OFFLINE, false, "connection lost while sending" },
	{ CURLE_RECV_ERROR, SM_HTTP_OFFLINE, false, "connection lost before the answer" },
	{ CURLE_GOT_NOTHING, SM_HTTP_OFFLINE, false, "connection closed before the answer" },
	/* a kept connection died under the body, and libcurl could not start over */
	{ CURLE_SEND_FAIL_REWIND, SM_HTTP_OFFLINE, false, "connection lost while sending" },

	/* the other end cannot prove who it is, or does not accept who we are */
	{ CURLE_SSL_CONNECT_ERROR, SM_HTTP_TLS, true, "TLS handshake failed" },
	{ CURLE_PEER_FAILED_VERIFICATION, SM_HTTP_TLS, true, "certificate not accepted" },
	{ CURLE_SSL_CIPHER, SM_HTTP_TLS, true, "no common cipher" },
	{ CURLE_SSL_ISSUER_ERROR, SM_HTTP_TLS, true, "issuer check failed" },
	{ CURLE_SSL_INVALIDCERTSTATUS, SM_HTTP_TLS, true, "invalid certificate status" },
	{ CURLE_SSL_CLIENTCERT, SM_HTTP_TLS, true, "client certificate required" },

	/* something answers, but not as HTTP wants it */
	{ CURLE_WEIRD_SERVER_REPLY, SM_HTTP_PROTOCOL, false, "answer is not HTTP" },
	/* the scheme was checked at submit: this is HTTP/0.9, that is, anything */
	{ CURLE_UNSUPPORTED_PROTOCOL, SM_HTTP_PROTOCOL, false, "answer is not HTTP" },
	{ CURLE_BAD_CONTENT_ENCODING, SM_HTTP_PROTOCOL, false, "answer is encoded" },
	{ CURLE_HTTP2, SM_HTTP_PROTOCOL, false, "HTTP/2 framing error" },
	{ CURLE_HTTP2_STREAM, SM_HTTP_PROTOCOL, false, "HTTP/2 stream was reset" },
	{ CURLE_PARTIAL_FILE, SM_HTTP_PROTOCOL, false, "answer cut off" },
	/* a callback refused more; what was not for want of memory is too long */
	{ CURLE_WRITE_ERROR, SM_HTTP_PROTOCOL, false, "answer too long" },

	/* nothing was sent, and nothing will be until somebody repairs it here */
	{ CURLE_URL_MALFORMAT, SM_HTTP_UNUSABLE, false, "not a valid http or https URL" },
	{ CURLE_SSL_CERTPROBLEM, SM_HTTP_UNUSABLE, true, "client certificate not usable" },
	{ CURLE_SSL_CACERT_BADFILE, SM_HTTP_UNUSABLE, true, "trusted certificates not usable" },
	{ CURLE_NOT_BUILT_IN, SM_HTTP_UNUSABLE, false, "not supported by this libcurl" },
	{ CURLE_OUT_OF_MEMORY, SM_HTTP_UNUSABLE, false, "out of memory" },
	{ CURLE_FAILED_INIT, SM_HTTP_UNUSABLE, false, "libcurl could not be initialized" },
	{ CURLE_UNRECOVERABLE_POLL, SM_HTTP_UNUSABLE, false, "could not wait for the socket" },
};

/*
 * Copy as printable ASCII on one line: translated messages and foreign headers
 * come in any encoding, and must not reach a table or a log so.
 */
static void
copy_printable(char *dst, size_t size, const char *src)
{
	size_t		n = 0;

	for (; *src != '\0' && n + 1 < size; src++)
		dst[n++] = (*src >= 0x20 && *src < 0x7f) ? *src : '?';
	dst[n] = '\0';
}

void
sm_http_outcome_fail(SmHttpResult *result, SmHttpOutcome outcome, const char *text)
{
	result->outcome = outcome;
	result->status = 0;
	copy_printable(result->error, sizeof(result->error), text);
}

/*
 * Did the link break during the handshake, rather than the handshake fail?
 * libcurl has one code for both; its text tells, by the system's message or by
 * OpenSSL's and GnuTLS's names for an end of file.
 */
static bool
handshake_was_cut(const char *curl_error)
{
	static const int link_errnos[] = { ECONNRESET, EPIPE, ETIMEDOUT, ECONNABORTED,
									   EHOSTUNREACH, ENETUNREACH, ENETDOWN };
	static const char *const link_texts[] = { "SSL_ERROR_SYSCALL", "unexpected eof",
											  "Error in the pull function",
											  "non-properly terminated" };

	for (int i = 0; i < lengthof(link_errnos); i++)
	{
		if (strstr(curl_error, strerror(link_errnos[i])) != NULL)
			return true;
	}
	for (int i = 0; i < lengthof(link_texts); i++)
	{
		if (strstr(curl_error, link_texts[i]) != NULL)
			return true;
	}
	return false;
}

/*
 * With TLS 1.3 a server refuses a client's certificate only after the
 * handshake: an alert comes where the answer was expected.  (Or sending fails
 * before it is read: then it looks like a lost link, until the next attempt.)
 */
static bool
was_tls_alert(const char *curl_error)
{
	return strstr(curl_error, "alert") != NULL &&
		(strstr(curl_error, "SSL") != NULL || strstr(curl_error, "TLS") != NULL);
}

/* The link failed: say it with the system's reason, or the time that has passed. */
static void
fail_offline(CURL *easy, CURLcode code, const char *text, SmHttpResult *result)
{
	char		detail[sizeof(result->error)];
	long		os_errno = 0;
	curl_off_t	connected_us = 0;

	if (code == CURLE_OPERATION_TIMEDOUT)
	{
		curl_easy_getinfo(easy, CURLINFO_PRETRANSFER_TIME_T, &connected_us);
		snprintf(detail, sizeof(detail), "%s within %ld ms",
				 connected_us > 0 ? "no answer" : "no connection", result->total_ms);
		text = detail;
	}
	else if (code == CURLE_COULDNT_CONNECT &&
			 curl_easy_getinfo(easy, CURLINFO_OS_ERRNO, &os_errno) == CURLE_OK &&
			 os_errno != 0)
	{
		snprintf(detail, sizeof(detail), "%s: %s", text, strerror((int) os_errno));
		text = detail;
	}
	sm_http_outcome_fail(result, SM_HTTP_OFFLINE, text);
}

/* The transfer failed with a code of libcurl's. */
static void
judge_failure(CURL *easy, CURLcode code, const SmHttpSeen *seen, const char *curl_error,
			  SmHttpResult *result)
{
	const CodeMeaning *meaning = NULL;
	bool		link_lost = (code == CURLE_SEND_ERROR || code == CURLE_RECV_ERROR ||
							 code == CURLE_GOT_NOTHING);

	for (int i = 0; i < lengthof(code_meanings) && meaning == NULL; i++)
	{
		if (code_meanings[i].code == code)
			meaning = &code_meanings[i];
	}

	/* where one of its addresses is allowed, it is that one which could not be reached */
	if (seen->peers_refused > 0 && seen->peers_allowed == 0)
		sm_http_outcome_fail(result, SM_HTTP_UNUSABLE, "the server's address is not in softmobile.central_networks");
	else if (meaning == NULL)
		sm_http_outcome_fail(result, SM_HTTP_PROTOCOL, curl_easy_strerror(code));
	else if (link_lost && seen->header_bytes > 0)
		sm_http_outcome_fail(result, SM_HTTP_PROTOCOL, "answer cut off");
	else if (link_lost && was_tls_alert(curl_error))
		sm_http_outcome_fail(result, SM_HTTP_TLS, curl_error);
	else if (code == CURLE_SSL_CONNECT_ERROR && handshake_was_cut(curl_error))
		sm_http_outcome_fail(result, SM_HTTP_OFFLINE,
							 "connection lost during the TLS handshake");
	else if (meaning->outcome == SM_HTTP_OFFLINE)
		fail_offline(easy, code, meaning->text, result);
	else
		sm_http_outcome_fail(result, meaning->outcome,
							 meaning->quote_curl && curl_error[0] != '\0' ?
							 curl_error : meaning->text);
}

/* The value of an answer's header, or NULL. */
static const char *
answer_header(CURL *easy, const char *name)
{
	struct curl_header *header;

	if (curl_easy_header(easy, name, 0, CURLH_HEADER, -1, &header) != CURLHE_OK)
		return NULL;
	return header->value;
}

/*
 * Retry-After is a number of seconds or a date.  A date is taken against the
 * server's own Date, so that a wrong clock on either side does not matter.
 */
static int64
parse_retry_after(const char *value, int64 server_date)
{
	int64		seconds;

	if (value == NULL)
		return -1;
	if (isdigit((unsigned char) value[0]))
		seconds = strtol(value, NULL, 10);	/* LONG_MAX when it overflows */
	else
	{
		time_t		when = curl_getdate(value, NULL);

		if (when == (time_t) -1)
			return -1;
		seconds = (int64) when - (server_date != 0 ? server_date : (int64) time(NULL));
	}
	return Min(Max(seconds, 0), MAX_RETRY_AFTER_MS / 1000) * 1000;
}

/* Until when the server's own certificate is valid, if libcurl was asked to remember. */
static void
note_certificate(CURL *easy, SmHttpResult *result)
{
	static const char label[] = "Expire date:";
	struct curl_certinfo *info = NULL;

	if (curl_easy_getinfo(easy, CURLINFO_CERTINFO, &info) != CURLE_OK || info == NULL || info->num_of_certs < 1)
		return;
	for (struct curl_slist *line = info->certinfo[0]; line != NULL; line = line->next)
		if (strncmp(line->data, label, sizeof(label) - 1) == 0)
			copy_printable(result->certificate_until, sizeof(result->certificate_until), line->data + sizeof(label) - 1);
}

bool
sm_http_outcome_judge(CURL *easy, CURLcode code, const SmHttpSeen *seen,
					  const char *curl_error, SmHttpResult *result)
{
	bool		whole = (code == CURLE_OK);
	long		status = 0;
	curl_off_t	total_us = 0;
	char	   *content_type = NULL;
	const char *value;

	curl_easy_getinfo(easy, CURLINFO_TOTAL_TIME_T, &total_us);
	result->total_ms = (long) (total_us / 1000);
	curl_easy_getinfo(easy, CURLINFO_RESPONSE_CODE, &status);
	note_certificate(easy, result);

	if (seen->no_memory)
		code = CURLE_OUT_OF_MEMORY;

	/*
	 * A refusal counts even if its body is cut off or too long: a server that
	 * does not want the rest of the request answers 413 and closes, and the
	 * end of its answer may be lost with the connection.
	 */
	if (seen->headers_done && status >= 300 &&
		(code == CURLE_SEND_ERROR || code == CURLE_RECV_ERROR ||
		 code == CURLE_PARTIAL_FILE || code == CURLE_WRITE_ERROR))
		code = CURLE_OK;

	if (code != CURLE_OK)
	{
		judge_failure(easy, code, seen, curl_error, result);
		return false;
	}

	/*
	 * libcurl is content with a connection that ends within the headers; we
	 * are not, an empty 2xx may settle a batch.
	 */
	if (!seen->headers_done)
	{
		sm_http_outcome_fail(result, SM_HTTP_PROTOCOL, "answer cut off");
		return false;
	}
	if (status < 200 || status > 599)
	{
		sm_http_outcome_fail(result, SM_HTTP_PROTOCOL, "answer without a final status");
		return false;
	}

	result->outcome = SM_HTTP_ANSWERED;
	result->status = status;
	curl_easy_getinfo(easy, CURLINFO_CONTENT_TYPE, &content_type);
	if (content_type != NULL)
		copy_printable(result->content_type, sizeof(result->content_type), content_type);
	value = answer_header(easy, "Date");
	if (value != NULL)
		result->date = Max((int64) curl_getdate(value, NULL), 0);
	result->retry_after_ms = parse_retry_after(answer_header(easy, "Retry-After"),
											   result->date);
	return whole;
}
